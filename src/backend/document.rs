//! What the supervisor must know of a stored result document without decoding it: whether it says SUCCESS.
//!
//! The document is whatever `result_serializer` makes. Pickle is never decoded here; Celery writes `status` first
//! into every document, and that is how it is found.

use serde::Deserialize;

/// So far into a binary document `status` may begin.
const HEAD: usize = 64;

#[derive(Deserialize)]
struct Meta<'a> {
    #[serde(borrow, default)]
    status: Option<std::borrow::Cow<'a, str>>,
}

/// Whether a stored document is that of a success, which nothing overwrites.
///
/// A compressed document (`result_compression`) does not tell and counts as no success.
pub fn is_success(document: &[u8]) -> bool {
    match document.first() {
        None | Some(0) => false,
        Some(b'{') if document.starts_with(br#"{"status": "SUCCESS""#) => true,
        Some(b'{') => serde_json::from_slice::<Meta<'_>>(document)
            .is_ok_and(|meta| meta.status.as_deref() == Some("SUCCESS")),
        // Pickle, and the maps of MessagePack.
        Some(0x80..=0x8f | 0xde | 0xdf) => binary(document),
        Some(_) => yaml(document),
    }
}

/// `status` and `SUCCESS` with nothing but their lengths between them.
fn binary(document: &[u8]) -> bool {
    let head = &document[..document.len().min(HEAD)];
    let Some(at) = head.windows(6).position(|window| window == b"status") else { return false };
    let rest = &head[at + 6..];
    (0..=8).any(|skipped| rest.get(skipped..).is_some_and(|rest| rest.starts_with(b"SUCCESS")))
}

fn yaml(document: &[u8]) -> bool {
    document.split(|byte| *byte == b'\n').any(|line| line == b"status: SUCCESS")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_found_in_what_each_serializer_writes() {
        let json =
            br#"{"status": "SUCCESS", "result": 3, "traceback": null, "children": [], "task_id": "1"}"#;
        let other = br#"{"result":{"status":"FAILURE"},"status":"SUCCESS"}"#;
        let pickle = b"\x80\x04\x95G\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x06status\x94\x8c\x07SUCCESS\x94\x8c\x06result";
        let old_pickle = b"\x80\x02}q\x00(X\x06\x00\x00\x00statusq\x01X\x07\x00\x00\x00SUCCESSq\x02X\x06\x00\x00\x00result";
        let msgpack = b"\x86\xa6status\xa7SUCCESS\xa6result\x03";
        let yaml =
            b"children: []\ndate_done: '2026-11-22T09:49:52.655368+00:00'\nresult: 3\nstatus: SUCCESS\n";
        for document in [&json[..], other, pickle, old_pickle, msgpack, yaml] {
            assert!(is_success(document), "{}", String::from_utf8_lossy(document));
        }
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        let json = br#"{"status": "FAILURE", "result": {"status": "SUCCESS"}}"#;
        let pickle = b"\x80\x04\x95\x00}\x94(\x8c\x06status\x94\x8c\x07FAILURE\x94\x8c\x06result\x94\x8c\x07SUCCESS\x94";
        let msgpack = b"\x86\xa6status\xa7STARTED\xa6result\xa7SUCCESS";
        let yaml = b"result: |-\n  status: SUCCESS\nstatus: FAILURE\n";
        let compressed = b"\0celery-compressed\0application/x-gzip\0status SUCCESS";
        for document in [&json[..], pickle, msgpack, yaml, compressed, b"", b"{", b"null"] {
            assert!(!is_success(document), "{}", String::from_utf8_lossy(document));
        }
    }
}
