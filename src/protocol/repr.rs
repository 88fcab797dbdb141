//! Values as Celery shows them in logs and events: its `saferepr`, cut at a length and a depth, and Python's `repr`
//! of a text. The values come as JSON text, which is how they travel.

use super::json::{self, JsonError};

/// How deep containers are shown, as `task_repr_maxlevels` by default.
pub const LEVELS: usize = 3;
/// How long a text may be, as `resultrepr_maxsize` by default.
pub const LENGTH: usize = 1024;

enum Token {
    /// The bracket, and the one that closes it.
    Open(&'static str, &'static str),
    Close(&'static str),
    /// A container too deep to be shown.
    Elided(&'static str),
    /// Text between values.
    Joint(&'static str),
    Quoted(String),
    Plain(String),
}

/// The text that Celery's `saferepr` gives for the value. `length`: none for no bound.
///
/// # Errors
/// When the text is not JSON.
pub fn saferepr(text: &str, length: Option<usize>, levels: usize) -> Result<String, JsonError> {
    let mut tokens = Vec::new();
    tokenize(text, levels, &mut tokens)?;
    Ok(assemble(&tokens, length))
}

/// The same for a JSON array that stands for a tuple, as positional arguments are; what is in it is lists and dicts.
///
/// # Errors
/// When the text is not a JSON array.
pub fn saferepr_tuple(text: &str, length: Option<usize>, levels: usize) -> Result<String, JsonError> {
    let elements = json::elements(text)?;
    let closing = if elements.len() == 1 { ",)" } else { ")" };
    let mut tokens = vec![Token::Open("(", closing)];
    sequence(&elements, levels.saturating_sub(1), &mut tokens)?;
    tokens.push(Token::Close(closing));
    Ok(assemble(&tokens, length))
}

fn sequence(elements: &[&str], levels: usize, tokens: &mut Vec<Token>) -> Result<(), JsonError> {
    for (index, element) in elements.iter().enumerate() {
        if index > 0 {
            tokens.push(Token::Joint(", "));
        }
        tokenize(element, levels, tokens)?;
    }
    Ok(())
}

fn assemble(tokens: &[Token], length: Option<usize>) -> String {
    let mut left = length.map(|length| i64::try_from(length).unwrap_or(i64::MAX));
    let mut open = Vec::new();
    let mut out = String::new();
    for token in tokens {
        if left.is_some_and(|left| left <= 0) {
            if let Token::Close(bracket) = token {
                // The value that was cut was the last one in its container: nothing is left out.
                out.push_str(bracket);
                open.pop();
                continue;
            }
            out.push_str(", ...");
            out.extend(open.iter().rev().copied());
            return out;
        }
        let shown = match token {
            Token::Open(bracket, closing) => {
                open.push(*closing);
                (*bracket).to_owned()
            }
            Token::Close(bracket) => {
                open.pop();
                (*bracket).to_owned()
            }
            Token::Elided(text) | Token::Joint(text) => (*text).to_owned(),
            Token::Quoted(text) => quoted(text, left),
            Token::Plain(text) => truncate(text, left),
        };
        left = left.map(|left| left - i64::try_from(shown.chars().count()).unwrap_or(i64::MAX));
        out.push_str(&shown);
    }
    out
}

fn quoted(text: &str, left: Option<i64>) -> String {
    format!("'{}'", truncate(text, left).replace('\'', "\\'"))
}

fn truncate(text: &str, left: Option<i64>) -> String {
    let Some(most) = left.and_then(|left| usize::try_from(left).ok()).filter(|most| *most > 0) else {
        return text.to_owned();
    };
    match text.char_indices().nth(most - 1) {
        Some((last, character)) => {
            let cut = &text[..last + character.len_utf8()];
            format!("{}...", cut.rsplit_once(' ').map_or(cut, |(before, _)| before))
        }
        None => text.to_owned(),
    }
}

fn tokenize(text: &str, levels: usize, tokens: &mut Vec<Token>) -> Result<(), JsonError> {
    let text = text.trim_ascii();
    match text.as_bytes().first() {
        Some(b'[') if levels == 0 => tokens.push(Token::Elided("[...]")),
        Some(b'[') => {
            tokens.push(Token::Open("[", "]"));
            sequence(&json::elements(text)?, levels - 1, tokens)?;
            tokens.push(Token::Close("]"));
        }
        Some(b'{') => {
            let members = json::members(text)?;
            if let (2, Some(kind), Some(value)) =
                (members.len(), members.get("__type__"), members.get("__value__"))
            {
                tokens.push(Token::Plain(extended(kind, value)));
                return Ok(());
            }
            if levels == 0 {
                tokens.push(Token::Elided("{...}"));
                return Ok(());
            }
            tokens.push(Token::Open("{", "}"));
            for (index, (key, value)) in members.into_iter().enumerate() {
                if index > 0 {
                    tokens.push(Token::Joint(", "));
                }
                tokens.push(Token::Quoted(key));
                tokens.push(Token::Joint(": "));
                tokenize(value, levels - 1, tokens)?;
            }
            tokens.push(Token::Close("}"));
        }
        Some(b'"') => tokens.push(Token::Quoted(serde_json::from_str(text)?)),
        _ => {
            json::check(text)?;
            tokens.push(Token::Plain(match text {
                "true" => "True".to_owned(),
                "false" => "False".to_owned(),
                "null" => "None".to_owned(),
                "NaN" => "nan".to_owned(),
                "Infinity" => "inf".to_owned(),
                "-Infinity" => "-inf".to_owned(),
                "-0" => "0".to_owned(),
                _ if text.contains(['.', 'e', 'E']) => text.parse().map_or(text.to_owned(), json::float),
                _ => text.to_owned(),
            }));
        }
    }
    Ok(())
}

/// The `repr` of the types that kombu adds to JSON. Times are shown by their ISO text.
fn extended(kind: &str, value: &str) -> String {
    let kind: String = serde_json::from_str(kind).unwrap_or_default();
    let text = |value: &str| serde_json::from_str::<String>(value).unwrap_or_else(|_| value.to_owned());
    match kind.as_str() {
        "decimal" => format!("Decimal({})", repr(&text(value))),
        "bytes" => format!("b'{}'", text(value)),
        "uuid" => {
            let hex = json::members(value).ok().and_then(|members| members.get("hex").map(|hex| text(hex)));
            let id = hex.and_then(|hex| uuid::Uuid::try_parse(&hex).ok());
            id.map_or_else(|| text(value), |id| format!("UUID('{id}')"))
        }
        "datetime" | "date" | "time" => format!("datetime.{kind}({})", repr(&text(value))),
        _ => text(value),
    }
}

/// Python's `repr` of a text.
pub fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if character == quote => {
                out.push('\\');
                out.push(quote);
            }
            _ if character.is_control() => {
                let code = u32::from(character);
                out.push_str(&format!("\\x{code:02x}"));
            }
            _ => out.push(character),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_as_saferepr_shows_them() {
        for (json, shown) in [
            (r#"[4, 6]"#, "[4, 6]"),
            (
                r#"{"a": [true, null, -0, -0.0, 1E2, 12345678901234567890]}"#,
                "{'a': [True, None, 0, -0.0, 100.0, 12345678901234567890]}",
            ),
            (r#""it's""#, r"'it\'s'"),
            (r#"[[[[]]], {"a": {"b": {}}}]"#, "[[[[...]]], {'a': {'b': {...}}}]"),
            (r#"[{"__type__": "decimal", "__value__": "1.5"}]"#, "[Decimal('1.5')]"),
            (
                r#"{"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000001"}}"#,
                "UUID('00000000-0000-0000-0000-000000000001')",
            ),
        ] {
            assert_eq!(saferepr(json, Some(LENGTH), LEVELS).unwrap(), shown);
        }
    }

    #[test]
    fn positional_arguments_are_shown_as_a_tuple() {
        for (json, length, shown) in [
            ("[]", LENGTH, "()"),
            ("[5]", LENGTH, "(5,)"),
            ("[[1], {}]", LENGTH, "([1], {})"),
            ("[[[[1]]]]", LENGTH, "([[[...]]],)"),
            ("[1, 2]", 3, "(1, , ...)"),
            ("[[1, 2, 3]]", 3, "([1..., ...],)"),
        ] {
            assert_eq!(saferepr_tuple(json, Some(length), LEVELS).unwrap(), shown, "{json}");
        }
        assert!(saferepr_tuple("{}", None, LEVELS).is_err());
    }

    #[test]
    fn recorded_values_are_cut_where_saferepr_cuts_them() {
        let rows: Vec<(String, Option<usize>, String)> =
            serde_json::from_str(include_str!("../../tests/messages/saferepr.json")).unwrap();
        assert!(rows.len() > 100);
        for (json, length, shown) in rows {
            assert_eq!(saferepr(&json, length, LEVELS).unwrap(), shown, "{json} at {length:?}");
        }
    }

    #[test]
    fn python_repr_picks_its_quotes() {
        for (text, shown) in
            [("a", "'a'"), ("it's", "\"it's\""), ("'\"", "'\\'\"'"), ("\n\u{7f}", "'\\n\\x7f'")]
        {
            assert_eq!(repr(text), shown);
        }
    }

    #[test]
    fn what_is_no_json_is_an_error_and_depth_costs_nothing() {
        assert!(saferepr("[1, x]", None, LEVELS).is_err());
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(saferepr(&deep, None, LEVELS).unwrap(), "[[[[...]]]]");
    }
}
