//! Which namespaces may ask for which models.

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};
use weightd_core::model::ModelRef;

/// Models, and the namespaces that the rule is about. `*` matches anything, slashes too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Glob on the model without its revision, such as `s3://bucket/team-a/*`.
    pub source: String,
    /// Glob on the pod's namespace.
    #[serde(default = "everything")]
    pub namespace: String,
}

fn everything() -> String {
    "*".to_owned()
}

/// A rule is not one.
#[derive(Debug, thiserror::Error)]
#[error("`{glob}` is no glob: {reason}")]
pub struct RuleError {
    glob: String,
    reason: String,
}

/// A rule says no.
#[derive(Debug, thiserror::Error)]
#[error("namespace `{namespace}` may not use {model}: {reason}")]
pub struct Refused {
    namespace: String,
    model: String,
    reason: String,
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
    namespace: GlobMatcher,
}

impl Compiled {
    fn new(rule: &Rule) -> Result<Self, RuleError> {
        let glob = |text: &str| {
            let error = |reason: String| RuleError {
                glob: text.to_owned(),
                reason,
            };
            if text.is_empty() {
                return Err(error("it is empty".to_owned()));
            }
            let built = GlobBuilder::new(text).literal_separator(false).build();
            built
                .map(|glob| glob.compile_matcher())
                .map_err(|found| error(found.kind().to_string()))
        };
        Ok(Self {
            source: glob(&rule.source)?,
            namespace: glob(&rule.namespace)?,
            rule: rule.clone(),
        })
    }

    fn covers(&self, model: &str, namespace: &str) -> bool {
        self.source.is_match(model) && self.namespace.is_match(namespace)
    }
}

impl Policy {
    /// # Errors
    ///
    /// [`RuleError`] for a text that is no glob.
    pub fn new(allow: &[Rule], deny: &[Rule]) -> Result<Self, RuleError> {
        let compile = |rules: &[Rule]| {
            rules
                .iter()
                .map(Compiled::new)
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            allow: compile(allow)?,
            deny: compile(deny)?,
        })
    }

    /// Whether nothing limits who may use what.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// # Errors
    ///
    /// [`Refused`] if the namespace may not use the model.
    pub fn check(&self, model: &ModelRef, namespace: &str) -> Result<(), Refused> {
        let name = format!("{}://{}", model.scheme().as_str(), model.name());
        let refuse = |reason: String| Refused {
            namespace: namespace.to_owned(),
            model: name.clone(),
            reason,
        };
        let covers = |rule: &&Compiled| rule.covers(&name, namespace);
        if let Some(Compiled { rule, .. }) = self.deny.iter().find(covers) {
            let text = format!("denied to `{}` in `{}`", rule.source, rule.namespace);
            return Err(refuse(text));
        }
        if !self.allow.is_empty() && !self.allow.iter().any(|rule| rule.covers(&name, namespace)) {
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
        // Nobody vouches for a namespace: only rules for all namespaces count.
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
}
