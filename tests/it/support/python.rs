//! Celery itself, where a Python that has it is at hand: `PYTHON` names it, else it is `python3`.

use std::process::{Child, Command, Stdio};

/// A Python interpreter.
pub(crate) struct Python(String);

/// The interpreter, if it can import `module`. Absent where `CI=true`: a failure; elsewhere the test says that
/// it is skipped.
pub(crate) fn python(module: &str) -> Option<Python> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let imported =
        Command::new(&python).args(["-c", &format!("import {module}")]).stderr(Stdio::null()).status();
    if imported.is_ok_and(|status| status.success()) {
        return Some(Python(python));
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{python} cannot import {module}, and this is CI");
    eprintln!("skipped: {python} cannot import {module}");
    None
}

impl Python {
    /// Runs it to its end, which must be a success; gives what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        self.start(arguments).said()
    }

    /// Starts it.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let child = Command::new(&self.0)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("it was started before");
        Running(Some(child))
    }
}

/// A running interpreter, killed on drop.
pub(crate) struct Running(Option<Child>);

impl Running {
    /// Waits for its end, which must be a success; gives what it printed.
    pub(crate) fn said(mut self) -> String {
        let child = self.0.take().expect("only taken here and on drop");
        let output = child.wait_with_output().expect("a child can be waited for");
        assert!(output.status.success(), "Python ended with {}", output.status);
        String::from_utf8(output.stdout).expect("Python prints UTF-8")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended by itself, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
