//! A Python with the real Celery, as the other end of the wire.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A Python that imports Celery: `$CELERIAC_PYTHON`, the project's `.venv`, or `python3`. Absent where `CI=true`: a
/// failure; elsewhere the test says that it is skipped.
pub(crate) fn python() -> Option<PathBuf> {
    let venv = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let candidates =
        [std::env::var_os("CELERIAC_PYTHON").map(PathBuf::from), Some(venv), Some("python3".into())];
    let found = candidates.into_iter().flatten().find(|python| {
        let check = Command::new(python)
            .args(["-c", "import celery, redis"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        check.is_ok_and(|status| status.success())
    });
    if found.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "no Python with Celery, and this is CI");
        eprintln!("skipped: no Python with Celery; set CELERIAC_PYTHON");
    }
    found
}

/// Runs a script with `input` on its standard input and gives what it prints; panics with its errors when it fails.
pub(crate) fn script(python: &PathBuf, script: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(python)
        .arg("-c")
        .arg(script)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut stdin = child.stdin.take().expect("standard input is a pipe");
    stdin.write_all(input.as_bytes()).expect("Python reads its input");
    drop(stdin);
    let output = child.wait_with_output().expect("Python ends");
    assert!(output.status.success(), "the script failed:\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("Python prints UTF-8")
}
