//! Texts that are to be globs: those of a caller, and those of a file that anyone may have written.

use globset::{Glob, GlobSet, GlobSetBuilder};
use serde::Deserialize;

use super::{PatternError, Patterns};

/// [`Patterns`] as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unchecked {
    #[serde(default)]
    include: Vec<String>,
    #[serde(default)]
    exclude: Vec<String>,
}

impl TryFrom<Unchecked> for Patterns {
    type Error = PatternError;
    fn try_from(unchecked: Unchecked) -> Result<Self, Self::Error> {
        Self::new(unchecked.include, unchecked.exclude)
    }
}

/// The globs in one order, each once, of which a set can be built.
pub(super) fn checked(mut globs: Vec<String>) -> Result<Vec<String>, PatternError> {
    globs.sort();
    globs.dedup();
    let refused = |glob: &str, reason: String| {
        Err(PatternError {
            // Enough to know it by: an error is passed on in a header.
            glob: glob.chars().take(200).collect(),
            reason,
        })
    };
    if globs.iter().any(String::is_empty) {
        return refused("", "it is empty".to_owned());
    }
    // All of them together: globs that parse one by one may be too large as a set.
    match set(&globs) {
        Ok(_) => Ok(globs),
        Err(error) => {
            let longest = globs.iter().max_by_key(|glob| glob.len());
            let longest = longest.map_or("", String::as_str);
            refused(error.glob().unwrap_or(longest), error.kind().to_string())
        }
    }
}

pub(super) fn built(globs: &[String]) -> GlobSet {
    set(globs).expect("Patterns::new built the same set, or it is one of ours")
}

fn set(globs: &[String]) -> Result<GlobSet, globset::Error> {
    let mut builder = GlobSetBuilder::new();
    for glob in globs {
        builder.add(Glob::new(glob)?);
    }
    builder.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_that_cannot_be_built_is_an_error() {
        let large = "[a-z]".repeat(300_000);
        Glob::new(&large).expect("it parses");

        let error = Patterns::new(vec!["*.gguf".to_owned(), large.clone()], Vec::new())
            .expect_err("built a set of it");

        assert_eq!(error.glob, large[..200]);
        assert!(!error.reason.is_empty());
    }

    #[test]
    fn what_a_file_holds_is_checked_as_what_a_user_typed() {
        let read = |text: &str| serde_json::from_str::<Patterns>(text);
        let typed = Patterns::new(vec!["a".into(), "b".into()], vec!["c".into()]).unwrap();
        assert_eq!(
            read(r#"{"include": ["b", "a", "b"], "exclude": ["c"]}"#).unwrap(),
            typed
        );
        let text = serde_json::to_string(&typed).unwrap();
        assert_eq!(read(&text).unwrap(), typed);
        assert_eq!(read("{}").unwrap(), Patterns::default());
        for bad in [
            r#"{"include": ["[a"]}"#,
            r#"{"exclude": [""]}"#,
            r#"{"other": []}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
