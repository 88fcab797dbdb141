//! The worker.

pub mod hooks;
pub mod revoked;
