//! Protocol 1 to protocol 2.
