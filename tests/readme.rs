//! The README tells the truth: its tables are those of the code.
//!
//! `UPDATE=1 cargo test -p weightd --test readme` writes them anew.

use std::path::Path;

use weightd::config::SETTINGS;
use weightd_core::metrics::DESCRIPTIONS;

fn settings() -> String {
    let mut table = String::from("| Setting | Default | Does |\n|---|---|---|\n");
    for setting in SETTINGS {
        let default = if setting.default.is_empty() {
            String::new()
        } else {
            format!("`{}`", setting.default)
        };
        table.push_str(&format!(
            "| `{}` | {default} | {} |\n",
            setting.key, setting.meaning
        ));
    }
    table
}

fn metrics() -> String {
    let mut table = String::from("| Metric | Kind | Labels | Says |\n|---|---|---|---|\n");
    for metric in DESCRIPTIONS {
        table.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            metric.name, metric.kind, metric.labels, metric.meaning
        ));
    }
    table
}

/// `text` with what stands between the marks of `name` replaced.
fn with_table(text: &str, name: &str, table: &str) -> String {
    let (open, close) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let start = text.find(&open).expect("the opening mark") + open.len();
    let end = text.find(&close).expect("the closing mark");
    format!("{}{table}{}", &text[..start], &text[end..])
}

#[test]
fn the_tables_of_the_readme_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(&path).expect("README.md");
    let expected = with_table(
        &with_table(&text, "settings", &settings()),
        "metrics",
        &metrics(),
    );
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &expected).expect("README.md");
        return;
    }
    assert!(
        text == expected,
        "run `UPDATE=1 cargo test -p weightd --test readme` and look at what changed"
    );
}
