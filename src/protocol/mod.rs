//! Bytes to types and back. No I/O, no clock, no Python.

pub mod json;
mod message;
pub mod repr;
pub mod result;
pub mod signature;
pub mod time;
pub mod v1;

pub use message::{DeliveryInfo, Json, Kind, Message, TaskHeaders, TimeLimits};
