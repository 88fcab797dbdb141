//! The page of all commands, for `docs/commands.md`.

use std::fmt::Write;

use super::table::{COMMANDS, Kind};

/// The reference of all commands of remote control, in Markdown.
pub fn reference() -> String {
    let mut text = "# Commands of remote control\n\n\
         Made from `src/control/table.rs` (`celeriac::control::reference`); a test compares them, and `make docs` writes\n\
         this page.\n\n\
         `celery inspect …` and `celery control …`, Flower and `app.control` send them as they do to Celery's own worker,\n\
         and the replies have the same shape. Commands that the app registers (`@inspect_command`, `@control_command`,\n\
         `Panel.register`) run in the worker's main process.\n"
        .to_owned();
    for (kind, title) in [(Kind::Inspect, "celery inspect"), (Kind::Control, "celery control")] {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n## {title}\n\n| command | needs | what it does |\n|---|---|---|\n");
        for command in COMMANDS.iter().filter(|command| command.kind == kind) {
            let names: Vec<String> = [Some(command.name), command.alias]
                .iter()
                .flatten()
                .map(|name| format!("`{name}`"))
                .collect();
            let needs: Vec<String> = command.required.iter().map(|name| format!("`{name}`")).collect();
            let _ = writeln!(text, "| {} | {} | {} |", names.join(", "), needs.join(", "), command.help());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_in_the_docs_are_those_of_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/commands.md");
        if std::env::var_os("CELERIAC_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == reference(), "{path} is stale: run `make docs`");
    }
}
