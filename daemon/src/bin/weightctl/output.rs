//! The only place that prints: results on stdout, all else on stderr.

use std::io::{self, Write};

use serde::Serialize;

use crate::args::Format;

/// Where results go, and in which form.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output(pub(crate) Format);

impl Output {
    pub(crate) fn is_text(self) -> bool {
        self.0 == Format::Text
    }

    /// Prints a result: `value` as one line of JSON, or what `text` makes of it.
    pub(crate) fn result<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let printed = match self.0 {
            Format::Json => serde_json::to_string(value)?,
            Format::Text => text(value),
        };
        plain(printed.as_bytes())?;
        if !printed.ends_with('\n') && !printed.is_empty() {
            plain(b"\n")?;
        }
        Ok(())
    }
}

/// Writes to stdout as it is.
pub(crate) fn plain(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        // The reader has seen enough, for example `head`. How the command ends is told by its exit code.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Tells the user something that is no result.
pub(crate) fn note(text: &str) {
    // Who closed stderr does not want to know.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Tells why it failed. The remedy stands on a line of its own.
pub(crate) fn error(text: &str) {
    let _ = writeln!(io::stderr(), "error: {text}");
}

/// Bytes for people: `16.1 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `7 files`, `1 file`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Seconds for people: `21.4 s`, `3 min 05 s`, `2 h 10 min`.
pub(crate) fn seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// Columns, as wide as their widest cell.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_for_people() {
        assert_eq!(
            [0, 1023, 1024, 1 << 20, 17_287_532_544].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "16.1 GiB"]
        );
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(
            [21.44, 185.0, 7800.0].map(seconds),
            ["21.4 s", "3 min 05 s", "2 h 10 min"]
        );
        assert_eq!(
            table(&[
                vec!["a".into(), "b".into()],
                vec!["long".into(), "c".into()]
            ]),
            "a     b\nlong  c\n"
        );
    }
}
