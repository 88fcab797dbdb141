//! Bytes to types and back. No I/O, no clock, no Python.

mod message;
pub mod result;
pub mod time;
pub mod v1;

pub use message::{DeliveryInfo, Json, Kind, Message, TaskHeaders, TimeLimits};
