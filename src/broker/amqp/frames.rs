//! What the server sends, made harmless before lapin parses it. Pure.
//!
//! lapin's parser calls itself for each level of a nested header, and a producer can nest some twenty thousand
//! levels into one frame: the stack overflows and the worker dies, again and again, since the message comes
//! back. It also closes the connection over a short string that is not UTF-8, which RabbitMQ lets through. Such
//! values are rewritten in place, no length changes: what is nested too deep becomes a string of bytes, a byte
//! that is not UTF-8 a question mark. On the way the server's greeting is read.

use std::str;

/// Deepest nesting of headers. serde_json refuses text deeper than 128.
const DEEPEST: usize = 64;
/// Type, channel, size.
const HEAD: usize = 7;
const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
/// Frames that are looked at are held back until they are whole; no server sends headers of this size.
const LARGEST: usize = 16 << 20;

/// The frames of one connection, from the server.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// The frame that is being collected.
    held: Vec<u8>,
    /// Bytes of a frame, its end mark included, that pass unseen.
    passing: usize,
    /// Whether the first frame, `connection.start`, has been seen.
    greeted: bool,
}

impl Frames {
    /// Takes what was read and appends what may be parsed to `out`. The greeting's payload, once, is returned.
    ///
    /// # Errors
    /// When a frame to be looked at is too large.
    pub(super) fn feed(
        &mut self,
        mut input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Vec<u8>>, &'static str> {
        let mut greeting = None;
        while !input.is_empty() {
            if self.passing > 0 {
                let (pass, rest) = input.split_at(self.passing.min(input.len()));
                out.extend_from_slice(pass);
                self.passing -= pass.len();
                input = rest;
                continue;
            }
            let wanted = if self.held.len() < HEAD { HEAD } else { self.whole()? };
            let (take, rest) = input.split_at((wanted - self.held.len()).min(input.len()));
            self.held.extend_from_slice(take);
            input = rest;
            if self.held.len() < HEAD {
                continue;
            }
            let kind = self.held[0];
            if !matches!(kind, METHOD | CONTENT_HEADER) {
                self.passing = self.size() + 1;
                out.append(&mut self.held);
                continue;
            }
            if self.held.len() < self.whole()? {
                continue;
            }
            let size = self.size();
            let payload = &mut self.held[HEAD..HEAD + size];
            if !self.greeted {
                self.greeted = true;
                greeting = Some(payload.to_vec());
            }
            match kind {
                METHOD => clean_deliver(payload),
                _ => clean_content_header(payload),
            };
            out.append(&mut self.held);
        }
        Ok(greeting)
    }

    fn size(&self) -> usize {
        u32::from_be_bytes([self.held[3], self.held[4], self.held[5], self.held[6]]) as usize
    }

    /// Length of the whole frame that is being collected.
    fn whole(&self) -> Result<usize, &'static str> {
        match self.size() {
            size if size > LARGEST && matches!(self.held[0], METHOD | CONTENT_HEADER) => {
                Err("the server sent a frame that is too large")
            }
            size => Ok(HEAD + size + 1),
        }
    }
}

/// Cursor over a payload; every step is `None` past the end. Whatever is malformed is left for lapin to refuse.
struct Walk<'payload> {
    bytes: &'payload mut [u8],
    at: usize,
}

impl Walk<'_> {
    fn skip(&mut self, count: usize) -> Option<()> {
        self.at = self.at.checked_add(count).filter(|at| *at <= self.bytes.len())?;
        Some(())
    }

    fn octet(&mut self) -> Option<u8> {
        let octet = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(octet)
    }

    fn short(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes([self.octet()?, self.octet()?]))
    }

    fn long(&mut self) -> Option<usize> {
        Some(u32::from_be_bytes([self.octet()?, self.octet()?, self.octet()?, self.octet()?]) as usize)
    }

    /// A short string, made UTF-8.
    fn short_string(&mut self) -> Option<()> {
        let length = usize::from(self.octet()?);
        let start = self.at;
        self.skip(length)?;
        let text = &mut self.bytes[start..start + length];
        while let Err(error) = str::from_utf8(text) {
            text[error.valid_up_to()] = b'?';
        }
        Some(())
    }

    /// A table, its nesting cut off at [`DEEPEST`].
    fn table(&mut self) -> Option<()> {
        // Where each open table or array ends, and whether its values have names.
        let mut open: Vec<(usize, bool)> = Vec::with_capacity(8);
        let length = self.long()?;
        open.push((self.at.checked_add(length)?, true));
        while let Some((end, named)) = open.last().copied() {
            if self.at >= end {
                open.pop();
                continue;
            }
            if named {
                self.short_string()?;
            }
            let kind_at = self.at;
            match self.octet()? {
                b't' | b'b' | b'B' => self.skip(1)?,
                b's' | b'U' | b'u' => self.skip(2)?,
                b'I' | b'i' | b'f' => self.skip(4)?,
                b'D' => self.skip(5)?,
                b'L' | b'l' | b'd' | b'T' => self.skip(8)?,
                b'V' => {}
                b'S' | b'x' => {
                    let length = self.long()?;
                    self.skip(length)?;
                }
                kind @ (b'F' | b'A') => {
                    let length = self.long()?;
                    if open.len() >= DEEPEST {
                        // The same layout: a length and so many bytes.
                        self.bytes[kind_at] = b'x';
                        self.skip(length)?;
                    } else {
                        open.push((self.at.checked_add(length)?, kind == b'F'));
                    }
                }
                _ => return None,
            }
        }
        Some(())
    }
}

/// `basic.deliver`: consumer tag, delivery tag, redelivered, exchange, routing key.
fn clean_deliver(payload: &mut [u8]) -> Option<()> {
    let mut walk = Walk { bytes: payload, at: 0 };
    if (walk.short()?, walk.short()?) != (60, 60) {
        return None;
    }
    walk.short_string()?;
    walk.skip(9)?;
    walk.short_string()?;
    walk.short_string()
}

/// Class, weight, body size, flags, then the properties that the flags name, the first flag first.
fn clean_content_header(payload: &mut [u8]) -> Option<()> {
    let mut walk = Walk { bytes: payload, at: 0 };
    walk.skip(12)?;
    let flags = walk.short()?;
    for bit in (2..16).rev() {
        if flags & (1 << bit) == 0 {
            continue;
        }
        match bit {
            13 => walk.table()?,
            // delivery_mode, priority
            11 | 12 => walk.skip(1)?,
            // timestamp
            6 => walk.skip(8)?,
            _ => walk.short_string()?,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    fn nested(levels: usize) -> Vec<u8> {
        // {"a": [[…]]}
        let mut value = vec![b'V'];
        for _ in 0..levels {
            value = [&[b'A'][..], &u32::try_from(value.len()).unwrap().to_be_bytes(), &value].concat();
        }
        let table = [&[1, b'a'][..], &value].concat();
        let mut payload = [0; 12].to_vec();
        payload.extend([0x20, 0]);
        payload.extend(u32::try_from(table.len()).unwrap().to_be_bytes());
        payload.extend(table);
        payload
    }

    fn fed(input: &[u8], step: usize) -> (Vec<u8>, Option<Vec<u8>>) {
        let (mut frames, mut out, mut greeting) = (Frames::default(), Vec::new(), None);
        for part in input.chunks(step) {
            greeting = frames.feed(part, &mut out).unwrap().or(greeting);
        }
        (out, greeting)
    }

    #[test]
    fn harmless_frames_pass_as_they_are_however_they_are_cut() {
        let deliver = [&[0, 60, 0, 60, 1, b'c'][..], &[0; 8], &[0, 1, b'e', 2, b'r', b'k']].concat();
        let stream = [
            frame(1, b"start"),
            frame(1, &deliver),
            frame(2, &nested(3)),
            frame(3, &[7; 300]),
            frame(8, b""),
        ]
        .concat();
        for step in [1, 2, 3, 7, 8, 100, 10_000] {
            let (out, greeting) = fed(&stream, step);
            assert_eq!(out, stream, "step {step}");
            assert_eq!(greeting.as_deref(), Some(&b"start"[..]));
        }
    }

    #[test]
    fn nesting_that_is_too_deep_becomes_bytes_of_the_same_length() {
        let stream = frame(2, &nested(20_000));
        let (out, _) = fed(&stream, 4096);
        let different: Vec<_> = out.iter().zip(&stream).filter(|(out, sent)| out != sent).collect();
        assert_eq!(different, [(&b'x', &b'A')]);
        assert_eq!(fed(&frame(2, &nested(DEEPEST - 1)), 4096).0, frame(2, &nested(DEEPEST - 1)));
    }

    #[test]
    fn short_strings_become_utf_8_wherever_they_are() {
        let sent = [&[0, 60, 0, 60, 1, 0xff][..], &[0; 8], &[0, 1, b'e', 3, b'r', 0xc3, b'k']].concat();
        let expected = [&[0, 60, 0, 60, 1, b'?'][..], &[0; 8], &[0, 1, b'e', 3, b'r', b'?', b'k']].concat();
        assert_eq!(fed(&frame(1, &sent), 5).0, frame(1, &expected));
        // content type, header name, priority, correlation id
        let header =
            |bad: u8| [&[0; 12][..], &[0xac, 0, 1, bad, 0, 0, 0, 3, 1, bad, b'V', 5, 1, bad]].concat();
        assert_eq!(fed(&frame(2, &header(0xfe)), 5).0, frame(2, &header(b'?')));
    }

    #[test]
    fn malformed_frames_pass_unchanged_and_nothing_panics() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..3000 {
            let mut payload = nested(random.usize(0..70));
            for _ in 0..random.usize(0..8) {
                let at = random.usize(0..payload.len());
                payload[at] = random.u8(..);
            }
            payload.truncate(random.usize(0..=payload.len()));
            let stream = frame(random.u8(1..3), &payload);
            assert_eq!(fed(&stream, 64).0.len(), stream.len());
        }
        assert!(Frames::default().feed(&[2, 0, 0, 0xff, 0xff, 0xff, 0xff, 0], &mut Vec::new()).is_err());
    }
}
