//! What workers tell each other.

pub mod clock;
pub mod events;
pub mod gossip;
pub mod heartbeat;
pub mod mingle;

use serde::Deserialize;

use crate::broker::topology::Queue;

/// What the configuration says of the neighbours.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ClusterConfig {
    /// Whether others are asked what they know when the worker comes.
    #[serde(default)]
    pub mingle: bool,
    /// The queue by which others are heard, without the part of its name that is made anew for each connection; none:
    /// no gossip.
    #[serde(default)]
    pub gossip: Option<Queue>,
}
