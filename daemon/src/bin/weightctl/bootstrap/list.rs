//! Lists of models: as a text, and where one stands in an instance's user data.

use std::path::Path;

use mail_parser::{MessageParser, MimeHeaders};
use serde::Deserialize;
use weightd::config::{Config, Prefetch};
use weightd_core::errors::Chain;
use weightd_core::fetch::FetchRequest;
use weightd_core::model::{ModelRef, Patterns};

/// The type of the parts of MIME user data that are lists.
const PART: (&str, &str) = ("text", "x-weightd-prefetch");

/// The lines around a list in other user data, such as a script. Behind `#` they are comments there.
const SECTION: (&str, &str) = ("BEGIN weightd prefetch", "END weightd prefetch");

/// The models of a list, and what is wrong with the rest of it.
#[derive(Debug, Default)]
pub(super) struct List {
    pub(super) requests: Vec<FetchRequest>,
    pub(super) problems: Vec<String>,
}

impl List {
    pub(super) fn problem(text: String) -> Self {
        Self {
            requests: Vec::new(),
            problems: vec![text],
        }
    }

    /// Adds what another list has and this one lacks.
    pub(super) fn add(&mut self, other: Self) {
        for request in other.requests {
            self.want(request);
        }
        self.problems.extend(other.problems);
    }

    fn want(&mut self, request: FetchRequest) {
        if !self.requests.contains(&request) {
            self.requests.push(request);
        }
    }
}

/// A list as TOML, with the keys of the daemon's configuration.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Toml {
    prefetch: Vec<toml::Value>,
}

/// The list in a file.
pub(super) fn read(path: &Path) -> List {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, &path.display().to_string()),
        Err(error) => List::problem(format!(
            "cannot read the list {}: {}",
            path.display(),
            Chain(&error)
        )),
    }
}

/// The models of a list, which `origin` names. It is TOML if a table `[[prefetch]]` stands in it; else models
/// separated by white space or commas, and `#` begins a comment. One bad entry does not spoil the others.
pub(super) fn parse(text: &str, origin: &str) -> List {
    let is_toml = text.lines().any(|line| line.trim_start().starts_with("[["));
    if is_toml {
        return parse_toml(text, origin);
    }
    let mut list = List::default();
    for (number, line) in text.lines().enumerate() {
        for word in line
            .split([' ', '\t', ',', '\r'])
            .filter(|word| !word.is_empty())
        {
            if word.starts_with('#') {
                break;
            }
            match word.parse::<ModelRef>() {
                Ok(model) => list.want(FetchRequest {
                    model,
                    patterns: Patterns::default(),
                    pin: None,
                }),
                Err(error) => {
                    list.problems
                        .push(format!("{origin}, line {}: {}", number + 1, Chain(&error)))
                }
            }
        }
    }
    list
}

fn parse_toml(text: &str, origin: &str) -> List {
    let entries = match toml::from_str::<Toml>(text) {
        Ok(list) => list.prefetch,
        Err(error) => {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            return List::problem(format!("{origin}, line {line}: {}", error.message()));
        }
    };
    let mut list = List::default();
    for (number, entry) in entries.into_iter().enumerate() {
        match request(entry) {
            Ok(requests) => requests.into_iter().for_each(|request| list.want(request)),
            Err(error) => list.problems.push(format!(
                "{origin}, [[prefetch]] number {}: {error}",
                number + 1
            )),
        }
    }
    list
}

/// The daemon's own reading of an entry.
fn request(entry: toml::Value) -> Result<Vec<FetchRequest>, String> {
    let entry: Prefetch = entry
        .try_into()
        .map_err(|error: toml::de::Error| error.message().to_owned())?;
    let config = Config {
        prefetch: vec![entry],
        ..Config::default()
    };
    let kept = config.kept().map_err(|error| Chain(&error).to_string())?;
    Ok(kept.into_iter().map(|kept| kept.request).collect())
}

/// The lists in an instance's user data: the MIME parts of their own type, else the marked sections.
pub(super) fn in_user_data(text: &str) -> List {
    let mut list = List::default();
    for part in parts(text) {
        list.add(parse(&part, "the user data's list"));
    }
    if list.requests.is_empty() && list.problems.is_empty() {
        list.add(parse(&section(text), "the user data's section"));
    }
    list
}

fn parts(text: &str) -> Vec<String> {
    let start = text.trim_start();
    let is_mime = ["mime-version:", "content-type:"].iter().any(|header| {
        let head = start.get(..header.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(header))
    });
    if !is_mime {
        return Vec::new();
    }
    let Some(message) = MessageParser::new().parse(start) else {
        return Vec::new();
    };
    let is_list = |part: &&mail_parser::MessagePart<'_>| {
        let kind = part.content_type();
        let subtype = |kind: &mail_parser::ContentType<'_>| {
            let subtype = kind.subtype().unwrap_or_default();
            kind.ctype().eq_ignore_ascii_case(PART.0) && subtype.eq_ignore_ascii_case(PART.1)
        };
        kind.is_some_and(subtype)
    };
    let parts = message.parts.iter().filter(is_list);
    parts
        .map(|part| part.text_contents().unwrap_or_default().to_owned())
        .collect()
}

/// What stands between the marks, without the `#` before each line.
fn section(text: &str) -> String {
    let mut found = String::new();
    let mut inside = false;
    for line in text.lines() {
        let bare = line.trim().trim_start_matches('#').trim();
        if bare == SECTION.0 || bare == SECTION.1 {
            inside = bare == SECTION.0;
        } else if inside {
            let line = line.trim();
            found.push_str(line.strip_prefix('#').unwrap_or(line));
            found.push('\n');
        }
    }
    found
}

#[cfg(test)]
mod tests;
