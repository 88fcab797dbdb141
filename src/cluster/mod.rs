//! What workers tell each other.

pub mod clock;
