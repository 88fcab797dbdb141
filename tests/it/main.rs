//! One integration test binary: a module an area. Conformance suites run each check against every
//! implementation of a trait, on real servers that the tests start themselves.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod amqp;
mod backend;
mod broker;
mod events;
mod hosting;
mod native;
mod redis;
mod result;
mod support;
mod worker;
