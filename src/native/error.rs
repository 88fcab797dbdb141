//! How a native task fails: the exception that a Python caller of `result.get()` sees.

use serde_json::Value;

use crate::protocol::result::Exception;

/// Module of exceptions that Python has no class for: their reader makes one.
pub(super) const MODULE: &str = "celeriac";

/// Exceptions that every Python has.
#[rustfmt::skip]
const BUILTINS: &[&str] = &[
    "ArithmeticError", "AssertionError", "AttributeError", "BlockingIOError", "BrokenPipeError", "BufferError",
    "ChildProcessError", "ConnectionAbortedError", "ConnectionError", "ConnectionRefusedError",
    "ConnectionResetError", "EOFError", "Exception", "FileExistsError", "FileNotFoundError", "FloatingPointError",
    "ImportError", "IndexError", "InterruptedError", "IsADirectoryError", "KeyError", "LookupError", "MemoryError",
    "ModuleNotFoundError", "NameError", "NotADirectoryError", "NotImplementedError", "OSError", "OverflowError",
    "PermissionError", "ProcessLookupError", "RecursionError", "ReferenceError", "RuntimeError", "SystemError",
    "TimeoutError", "TypeError", "ValueError", "ZeroDivisionError",
];

/// A failed task: type and message of the exception that is recorded.
///
/// Any [`std::error::Error`] becomes one with `?`: its type's name, its message, and its sources in the traceback.
///
/// ```
/// use celeriac::native::TaskError;
///
/// fn parse(text: &str) -> Result<u32, TaskError> {
///     let number: u32 = text.parse()?;
///     if number == 0 {
///         return Err(TaskError::new("ValueError", "zero is no size"));
///     }
///     Ok(number)
/// }
/// assert_eq!(parse("0").unwrap_err().to_string(), "ValueError: zero is no size");
/// assert_eq!(parse("x").unwrap_err().to_string(), "celeriac.ParseIntError: invalid digit found in string");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TaskError {
    pub(super) exception: Exception,
    causes: Vec<String>,
}

impl TaskError {
    /// An exception of this type with a message. `kind` is the name of one of Python's own exceptions (`ValueError`), the
    /// dotted path of a class that the caller has (`shop.errors.SoldOut`), or any other name.
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self::with_arguments(kind, vec![Value::String(message.into())])
    }

    /// The same with any arguments for the exception's constructor.
    pub fn with_arguments(kind: &str, arguments: Vec<Value>) -> Self {
        let (module, kind) = match kind.rsplit_once('.') {
            Some((module, kind)) => (module, kind),
            None if BUILTINS.contains(&kind) => ("builtins", kind),
            None => (MODULE, kind),
        };
        let exception = Exception { kind: kind.to_owned(), module: module.to_owned(), arguments };
        Self { exception, causes: Vec::new() }
    }

    /// The type's name, without its module.
    pub fn kind(&self) -> &str {
        &self.exception.kind
    }

    /// What is stored as the traceback: the causes, the deepest first, then the exception.
    pub(super) fn traceback(&self) -> String {
        let mut text = String::new();
        for cause in self.causes.iter().rev() {
            text.push_str(cause);
            text.push_str("\n\nThe above was the cause of the following:\n\n");
        }
        text.push_str(&self.exception.line());
        text.push('\n');
        text
    }
}

impl std::fmt::Display for TaskError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.exception.line())
    }
}

// It is no `std::error::Error` itself, so that every error can become one.
impl<E: std::error::Error> From<E> for TaskError {
    fn from(error: E) -> Self {
        let path = std::any::type_name::<E>();
        let path = path.split('<').next().unwrap_or(path);
        let kind = path.rsplit("::").next().unwrap_or(path);
        let mut failed = Self::with_arguments(&format!("{MODULE}.{kind}"), vec![error.to_string().into()]);
        let mut source = error.source();
        while let Some(cause) = source {
            failed.causes.push(cause.to_string());
            source = cause.source();
        }
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_builtin_a_path_or_ours() {
        for (kind, module) in
            [("ValueError", "builtins"), ("shop.errors.SoldOut", "shop.errors"), ("Odd", "celeriac")]
        {
            assert_eq!(TaskError::new(kind, "m").exception.module, module);
        }
        assert_eq!(TaskError::new("shop.errors.SoldOut", "m").kind(), "SoldOut");
    }

    #[test]
    fn an_error_brings_its_sources_along() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read the size")]
        struct NoSize<T>(#[source] std::num::ParseIntError, T);
        let source = "x".parse::<u8>().unwrap_err();
        let error = TaskError::from(NoSize(source, 1));
        assert_eq!(error.kind(), "NoSize");
        let lines: Vec<_> = error.traceback().lines().map(str::to_owned).collect();
        assert_eq!(lines.first().unwrap(), "invalid digit found in string");
        assert_eq!(lines.last().unwrap(), "celeriac.NoSize: cannot read the size");
    }
}
