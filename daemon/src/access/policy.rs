//! Which namespaces may ask for which models.
//!
//! What a denial does not see: files that `include` picks out of a tree by a rule whose first wildcard stands
//! before the end of that tree's name, such as `s3://models/*/secret` and a request for `s3://models/a`. And
//! a repository of the Hub's under a name that it had before, while the Hub is away and
//! `when_unreachable = "allow"` lets in without its word. Where it matters, allow what is wanted instead.

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};
use weightd_core::model::{ModelRef, Scheme};

/// The characters that a glob gives a meaning to.
const GLOB: [char; 5] = ['*', '?', '[', '{', '\\'];

/// Models, and the namespaces that the rule is about. `*` matches anything, slashes too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Glob on the model as it is written, without its revision, such as `s3://bucket/team-a/*`.
    pub source: String,
    /// Glob on the pod's namespace.
    #[serde(default = "everything")]
    pub namespace: String,
}

fn everything() -> String {
    "*".to_owned()
}

/// A rule would not do what it says.
#[derive(Debug, thiserror::Error)]
#[error("`{glob}` {reason}")]
pub struct RuleError {
    /// The setting that it stands in.
    pub key: &'static str,
    glob: String,
    reason: String,
}

/// A rule says no.
#[derive(Debug, thiserror::Error)]
#[error("{} may not use {model}: {reason}", whose(.namespace))]
pub struct Refused {
    namespace: String,
    model: String,
    reason: String,
}

fn whose(namespace: &str) -> String {
    match namespace {
        "" => "a pod whose namespace nobody vouches for".to_owned(),
        namespace => format!("namespace `{namespace}`"),
    }
}

/// The rules. A denial beats an allowance; if anything is allowed by name, all else is denied.
#[derive(Debug, Default)]
pub struct Policy {
    allow: Vec<Compiled>,
    deny: Vec<Compiled>,
}

#[derive(Debug)]
struct Compiled {
    rule: Rule,
    source: GlobMatcher,
    /// The same for names of the Hub's, which takes upper and lower case for the same.
    source_at_hub: GlobMatcher,
    namespace: GlobMatcher,
}

/// A model, as rules see it.
struct Asked {
    scheme: Scheme,
    text: String,
}

impl Compiled {
    fn new(key: &'static str, rule: &Rule) -> Result<Self, RuleError> {
        let error = |glob: &str, reason: String| RuleError {
            key,
            glob: glob.to_owned(),
            reason,
        };
        let glob = |text: &str, any_case: bool| {
            if text.is_empty() {
                return Err(error(text, "is no glob: it is empty".to_owned()));
            }
            let mut builder = GlobBuilder::new(text);
            builder.literal_separator(false).case_insensitive(any_case);
            let built = builder.build().map(|glob| glob.compile_matcher());
            built.map_err(|found| error(text, format!("is no glob: {}", found.kind())))
        };
        let compiled = Self {
            source: glob(&rule.source, false)?,
            source_at_hub: glob(&rule.source, true)?,
            namespace: glob(&rule.namespace, false)?,
            rule: rule.clone(),
        };
        let sound = check(&rule.source);
        sound.map_err(|reason| error(&rule.source, reason))?;
        Ok(compiled)
    }

    fn matches(&self, model: &Asked) -> bool {
        match model.scheme {
            Scheme::Hf => self.source_at_hub.is_match(&model.text),
            Scheme::S3 | Scheme::File => self.source.is_match(&model.text),
        }
    }

    /// Whether the model is a tree that holds some of what the rule names, or a part of what it names.
    fn overlaps(&self, model: &Asked) -> bool {
        if model.scheme == Scheme::Hf {
            return false;
        }
        let below = format!("{}/", model.text);
        let name = model.text.find("://").map_or(0, |at| at + 3);
        let above = model.text.rmatch_indices('/').map(|(at, _)| at);
        let mut above = above.take_while(|at| *at > name);
        self.source.is_match(&below)
            || literal(&self.rule.source).starts_with(&below)
            || above.any(|at| self.source.is_match(&model.text[..at]))
    }

    /// Whoever nobody vouches for may be anybody.
    fn denies(&self, model: &Asked, namespace: &str) -> bool {
        let whose = namespace.is_empty() || self.namespace.is_match(namespace);
        whose && (self.matches(model) || self.overlaps(model))
    }

    fn allows(&self, model: &Asked, namespace: &str) -> bool {
        let whose = match namespace {
            "" => self.rule.namespace == everything(),
            namespace => self.namespace.is_match(namespace),
        };
        whose && self.matches(model)
    }
}

fn literal(glob: &str) -> &str {
    glob.find(GLOB).map_or(glob, |at| &glob[..at])
}

/// Refuses a glob that can match no model, however sound it looks: such a denial would deny nothing.
fn check(glob: &str) -> Result<(), String> {
    const SCHEMES: [&str; 3] = ["hf://", "s3://", "file://"];
    let start = literal(glob);
    let open = start.len() < glob.len() && SCHEMES.iter().any(|scheme| scheme.starts_with(start));
    if !open && !SCHEMES.iter().any(|scheme| start.starts_with(scheme)) {
        return Err("matches no model: begin it with hf://, s3:// or file://".to_owned());
    }
    if glob.contains('@') {
        return Err(
            "matches no model: rules are about all revisions, so leave the @ and what follows it \
             away; an @ of the name itself is written as %40"
                .to_owned(),
        );
    }
    if let Some(name) = glob.strip_suffix('/') {
        return Err(format!(
            "matches no model, for none ends in a slash: write `{name}` for the model itself, or \
             `{name}/*` for those below"
        ));
    }
    let odd = |part| matches!(part, "" | "." | "..");
    let path = glob.strip_prefix("file:///");
    if path.is_some_and(|path| path.split('/').any(odd)) {
        return Err("matches no model: the path holds `//`, `.` or `..`".to_owned());
    }
    Ok(())
}

impl Policy {
    /// # Errors
    ///
    /// [`RuleError`] for a text that is no glob, or one that can match no model.
    pub fn new(allow: &[Rule], deny: &[Rule]) -> Result<Self, RuleError> {
        let compile = |key, rules: &[Rule]| {
            let rules = rules.iter().map(|rule| Compiled::new(key, rule));
            rules.collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            allow: compile("access.allow", allow)?,
            deny: compile("access.deny", deny)?,
        })
    }

    /// Whether nothing limits who may use what.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// # Errors
    ///
    /// [`Refused`] if the namespace may not use the model; an empty one is that of nobody knows whom.
    pub fn check(&self, model: &ModelRef, namespace: &str) -> Result<(), Refused> {
        let asked = Asked {
            scheme: model.scheme(),
            text: model.without_revision().to_string(),
        };
        let refuse = |reason: String| Refused {
            namespace: namespace.to_owned(),
            model: asked.text.clone(),
            reason,
        };
        let mut denials = self.deny.iter();
        if let Some(Compiled { rule, .. }) = denials.find(|rule| rule.denies(&asked, namespace)) {
            let text = format!("denied to `{}` in `{}`", rule.source, rule.namespace);
            return Err(refuse(text));
        }
        if !self.allow.is_empty() && !self.allow.iter().any(|rule| rule.allows(&asked, namespace)) {
            return Err(refuse("no rule allows it".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(rules: &[(&str, &str)]) -> Vec<Rule> {
        let rule = |(source, namespace): &(&str, &str)| Rule {
            source: (*source).to_owned(),
            namespace: (*namespace).to_owned(),
        };
        rules.iter().map(rule).collect()
    }

    fn may(policy: &Policy, model: &str, namespace: &str) -> bool {
        policy.check(&model.parse().unwrap(), namespace).is_ok()
    }

    #[test]
    fn without_rules_everything_may_be_asked_for() {
        let policy = Policy::new(&[], &[]).unwrap();
        assert!(may(&policy, "s3://bucket/x", "any") && policy.is_open());
    }

    #[test]
    fn what_no_rule_allows_is_denied_once_there_are_rules() {
        let policy = Policy::new(
            &rules(&[("hf://*", "*"), ("s3://models/team-a/*", "team-a*")]),
            &rules(&[("hf://org/secret", "*")]),
        )
        .unwrap();

        assert!(may(&policy, "hf://org/model@main", "default"));
        assert!(may(&policy, "s3://models/team-a/x/y", "team-a-prod"));
        assert!(!may(&policy, "s3://models/team-a/x", "team-b"));
        assert!(!may(&policy, "s3://models/team-b/x", "team-a"));
        assert!(!may(&policy, "hf://org/secret@main", "team-a"));
        assert!(!may(&policy, "s3://models/team-a/x", ""));
        assert!(may(&policy, "hf://org/model", ""));
    }

    #[test]
    fn a_refusal_names_the_rule_and_a_wrong_glob_is_named() {
        let policy = Policy::new(&[], &rules(&[("s3://*", "dev")])).unwrap();
        let error = policy.check(&"s3://bucket/x".parse().unwrap(), "dev");
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("`s3://*`") && text.contains("`dev`"),
            "{text}"
        );

        let error = Policy::new(&rules(&[("s3://[", "*")]), &[]).unwrap_err();
        assert!(error.to_string().contains("s3://["), "{error}");
    }

    #[test]
    fn a_denial_holds_for_every_way_to_ask_for_what_it_names() {
        let denied = [
            ("s3://models/secret/*", "s3://models/secret/x"),
            ("s3://models/secret/*", "s3://models/secret"),
            ("s3://models/secret/*", "s3://models/secret/"),
            ("s3://models/secret/*", "s3://models"),
            ("s3://models/secret", "s3://models/secret/part"),
            ("s3://models/a%40b", "s3://models/a%40b"),
            ("file:///models/secret*", "file:///models/./secret/x"),
            ("file:///models/secret*", "file:////models//secret"),
            ("file:///models/secret*", "file:///models"),
            ("hf://org/secret", "hf://ORG/Secret@main"),
            ("*", "file:///x"),
            ("*://models/x", "s3://models/x"),
        ];
        for (glob, model) in denied {
            for (whose, namespace) in [("*", "dev"), ("dev", "dev"), ("dev", "")] {
                let policy = Policy::new(&[], &rules(&[(glob, whose)])).unwrap();
                assert!(!may(&policy, model, namespace), "{glob}: {model}");
            }
            let policy = Policy::new(&[], &rules(&[(glob, "prod")])).unwrap();
            assert!(may(&policy, model, "dev"), "{glob}: {model}");
        }
        for (glob, model) in [
            ("s3://models/secret/*", "s3://models/secrets"),
            ("s3://models/secret", "s3://models/Secret"),
            ("hf://org/secret", "hf://org/secret-2"),
        ] {
            let policy = Policy::new(&[], &rules(&[(glob, "*")])).unwrap();
            assert!(may(&policy, model, "dev"), "{glob}: {model}");
        }
    }

    #[test]
    fn whoever_nobody_vouches_for_is_allowed_what_all_are() {
        let policy = Policy::new(&rules(&[("hf://a/*", "*"), ("hf://b/*", "{,x}")]), &[]);
        let policy = policy.unwrap();
        assert!(may(&policy, "hf://a/x", ""));
        assert!(!may(&policy, "hf://b/x", ""));
    }

    #[test]
    fn a_rule_that_can_match_nothing_is_refused_with_the_remedy() {
        for (glob, words) in [
            ("", "empty"),
            ("org/secret", "hf://, s3:// or file://"),
            ("models/*", "hf://, s3:// or file://"),
            ("gs://models/*", "hf://, s3:// or file://"),
            ("hf://org/secret@main", "%40"),
            ("s3://models/x@*", "%40"),
            ("s3://models/secret/", "`s3://models/secret/*`"),
            ("file:///models//x", "`//`"),
            ("file:///models/./x", "`.`"),
        ] {
            let error = Policy::new(&[], &rules(&[(glob, "*")])).expect_err(glob);
            assert_eq!(error.key, "access.deny");
            assert!(error.to_string().contains(words), "{error}");
        }
        for glob in ["*", "{hf,s3}://*", "s3://models/*", "file:///*", "hf://org"] {
            Policy::new(&rules(&[(glob, "*")]), &[]).expect(glob);
        }
    }
}
