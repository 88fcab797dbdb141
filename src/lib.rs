//! celeriac: the Celery worker, rebuilt in Rust.

pub mod backend;
pub mod broker;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod control;
pub mod error;
pub mod native;
pub mod pool;
pub mod protocol;
#[cfg(feature = "python")]
mod python;
pub mod worker;

pub use native::Worker;
