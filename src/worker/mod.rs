//! The worker.

pub mod hooks;
