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

/// How many globs there may be, of those that include and of those that exclude: 128.
const GLOBS: usize = 128;

/// How many bytes they may have together: 8 KiB. A set of them is built in milliseconds, and no set of so
/// few bytes outgrows what its builder takes.
const BYTES: usize = 8 << 10;

/// How deep braces may stand in braces: 32. The regular expressions that globs become have a limit too.
const DEPTH: usize = 32;

impl TryFrom<Unchecked> for Patterns {
    type Error = PatternError;
    /// A record is read often, so no set is built here: that each glob parses, and that they are few, is
    /// enough for the set to be built when it is needed.
    fn try_from(unchecked: Unchecked) -> Result<Self, Self::Error> {
        Ok(Self {
            include: parsed(unchecked.include)?,
            exclude: parsed(unchecked.exclude)?,
        })
    }
}

/// The globs in one order, each once, of which a set can be built.
pub(super) fn checked(globs: Vec<String>) -> Result<Vec<String>, PatternError> {
    let globs = parsed(globs)?;
    match set(&globs) {
        Ok(_) => Ok(globs),
        Err(error) => Err(refused(
            error.glob().unwrap_or_default(),
            error.kind().to_string(),
        )),
    }
}

/// The globs in one order, each once; each is one, and they are no more than the limits.
fn parsed(mut globs: Vec<String>) -> Result<Vec<String>, PatternError> {
    globs.sort();
    globs.dedup();
    if let Some(glob) = globs.get(GLOBS) {
        let count = globs.len();
        return Err(refused(
            glob,
            format!("it is one of {count}, and no more than {GLOBS} are taken"),
        ));
    }
    let bytes: usize = globs.iter().map(String::len).sum();
    if bytes > BYTES {
        let longest = globs.iter().max_by_key(|glob| glob.len());
        return Err(refused(
            longest.map_or("", String::as_str),
            format!("all of them have {bytes} bytes, and no more than {BYTES} are taken"),
        ));
    }
    for glob in &globs {
        if glob.is_empty() {
            return Err(refused("", "it is empty".to_owned()));
        }
        if depth(glob) > DEPTH {
            return Err(refused(glob, "its braces are nested too deep".to_owned()));
        }
        Glob::new(glob).map_err(|error| refused(glob, error.kind().to_string()))?;
    }
    Ok(globs)
}

/// How many braces are open at once, at the most. One that is quoted counts as well: nobody needs so many.
fn depth(glob: &str) -> usize {
    let (mut open, mut most) = (0_usize, 0);
    for byte in glob.bytes() {
        match byte {
            b'{' => open += 1,
            b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

fn refused(glob: &str, reason: String) -> PatternError {
    PatternError {
        // Enough to know it by: an error is passed on in a header.
        glob: glob.chars().take(200).collect(),
        reason,
    }
}

pub(super) fn built(globs: &[String]) -> GlobSet {
    set(globs).expect("each glob parses, and they are few and short, or they are ours")
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
    fn patterns_have_a_limit_wherever_they_come_from() {
        let read = |globs: &[String]| {
            let text = serde_json::json!({ "include": globs }).to_string();
            serde_json::from_str::<Patterns>(&text)
        };
        let many = |count: usize| (0..count).map(|n| format!("*{n}")).collect::<Vec<_>>();
        let long = |bytes: usize| vec!["*".to_owned(), "x".repeat(bytes - 1)];
        for fits in [many(GLOBS), long(BYTES)] {
            Patterns::new(fits.clone(), fits.clone()).expect("within the limits");
            read(&fits).expect("within the limits");
        }
        for (too_much, words) in [
            (many(GLOBS + 1), "it is one of 129, and no more than 128"),
            (long(BYTES + 1), "have 8193 bytes, and no more than 8192"),
        ] {
            for refused in [
                Patterns::new(too_much.clone(), Vec::new()),
                Patterns::new(Vec::new(), too_much.clone()),
            ] {
                let text = refused.expect_err("beyond the limits").to_string();
                assert!(text.contains(words) && text.len() < 300, "{text}");
            }
            let error = read(&too_much).expect_err("beyond the limits").to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn what_is_read_within_the_limits_can_be_built() {
        // What costs a builder the most for its bytes.
        for unit in [
            "[a-z]",
            "[!/]",
            "**/",
            "*a",
            "?",
            "{a,b*}",
            "\u{10ffff}",
            "[\u{e4}-\u{10ffff}]",
        ] {
            let glob = unit.repeat(BYTES / unit.len());
            let patterns = Unchecked {
                include: vec![glob],
                exclude: Vec::new(),
            };

            let patterns = Patterns::try_from(patterns).expect("it parses");

            built(patterns.include());
        }
        let nested = |depth: usize| format!("{}a{}", "{b,".repeat(depth), "}".repeat(depth));
        for (depth, fits) in [(DEPTH, true), (DEPTH + 1, false), (2000, false)] {
            let patterns = Unchecked {
                include: vec![nested(depth)],
                exclude: Vec::new(),
            };
            match Patterns::try_from(patterns) {
                Ok(patterns) if fits => drop(built(patterns.include())),
                Err(error) if !fits => assert!(error.to_string().contains("too deep"), "{error}"),
                outcome => panic!("{depth}: {outcome:?}"),
            }
        }
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
