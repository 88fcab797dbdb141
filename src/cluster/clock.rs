//! The logical clock that orders events and control messages of a cluster.

/// A Lamport clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LamportClock(u64);

impl LamportClock {
    /// A clock that stands at `value`.
    pub fn at(value: u64) -> Self {
        Self(value)
    }

    /// The current value.
    pub fn value(self) -> u64 {
        self.0
    }

    /// One step; the stamp of something sent.
    pub fn forward(&mut self) -> u64 {
        self.0 = self.0.saturating_add(1);
        self.0
    }

    /// Catches up with a stamp that was received.
    pub fn adjust(&mut self, other: u64) -> u64 {
        self.0 = self.0.max(other).saturating_add(1);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_only_goes_forward_and_never_wraps() {
        let mut clock = LamportClock::default();
        assert_eq!((clock.forward(), clock.adjust(10), clock.adjust(3), clock.forward()), (1, 11, 12, 13));
        clock.adjust(u64::MAX);
        assert_eq!(clock.forward(), u64::MAX);
    }
}
