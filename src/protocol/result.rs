//! The meta document of a result, for tasks that ran in Rust.
