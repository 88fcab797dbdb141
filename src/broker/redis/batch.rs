//! How many messages travel in one go.

/// Aimed at: a script that moves more keeps everybody else waiting for too long.
const BYTES: usize = 1024 * 1024;
/// Before anything is known of the messages.
const FIRST: usize = 8;

/// A size that follows the messages: many small ones, few large ones.
#[derive(Debug)]
pub(crate) struct Batch {
    size: usize,
    most: usize,
}

impl Batch {
    pub(crate) fn new(most: usize) -> Self {
        Self { size: FIRST.min(most), most }
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Learns from what has travelled. Grows by doubling, so that one small message does not open the gates.
    pub(crate) fn saw(&mut self, messages: usize, bytes: usize) {
        if let Some(average) = bytes.checked_div(messages) {
            let fitting = BYTES / average.max(1);
            self.size = fitting.clamp(1, self.most.min(self.size * 2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_messages_travel_in_ever_larger_batches_and_large_ones_alone() {
        let mut batch = Batch::new(64);
        let mut sizes = Vec::new();
        for _ in 0..4 {
            sizes.push(batch.size());
            batch.saw(batch.size(), batch.size() * 1000);
        }
        assert_eq!(sizes, [8, 16, 32, 64]);
        batch.saw(0, 0);
        assert_eq!(batch.size(), 64);
        batch.saw(64, 64 << 20);
        assert_eq!(batch.size(), 1);
    }
}
