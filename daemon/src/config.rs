//! What an operator sets: one TOML file, every value checked before any socket opens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use weightd_core::fetch::{FetchLimits, FetchRequest};
use weightd_core::model::{ModelRef, Patterns};
use weightd_core::shared::{Egress, SharedConfig, SharedOptions, is_segment};
use weightd_core::store::{Holder, StoreLimits};
use weightd_core::warm::WarmLimits;

use crate::access::{AccessLimits, PATIENCE, Policy};
use crate::sources::hf::{HfConfig, HfConfigError};
use crate::sources::s3::{S3Config, S3Identity};

mod sections;
mod settings;
mod units;

pub use sections::*;
pub use settings::{SETTINGS, Setting};
pub use units::{Bytes, Span};

/// The daemon's configuration. A key that is left out has its default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(
    missing_docs,
    reason = "SETTINGS says what each key means, and a test that none is missing"
)]
pub struct Config {
    pub root: PathBuf,
    pub socket: PathBuf,
    pub socket_uids: Vec<u32>,
    pub store: StoreSection,
    pub fetch: FetchSection,
    pub warm: WarmSection,
    pub hf: HfSection,
    pub s3: S3Section,
    pub file: FileSection,
    pub access: AccessSection,
    pub scrub: ScrubSection,
    pub metrics: MetricsSection,
    pub log: LogSection,
    pub shutdown: ShutdownSection,
    pub shared: SharedSection,
    pub kubernetes: KubernetesSection,
    pub controller: ControllerSection,
    pub prefetch: Vec<Prefetch>,
}

/// A model that the daemon keeps here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefetch {
    /// As `weightctl prefetch` takes it.
    pub model: ModelRef,
    /// Globs that replace the default set of files.
    #[serde(default)]
    pub include: Vec<String>,
    /// Globs that take files away.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Hold it as `operator/<pin>`.
    #[serde(default)]
    pub pin: Option<String>,
    /// Read it into the page cache once it is here.
    #[serde(default)]
    pub warm: bool,
}

/// A model that the daemon keeps here, as the fetcher takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What is fetched.
    pub request: FetchRequest,
    /// Read it into the page cache once it is here.
    pub warm: bool,
}

impl From<FetchRequest> for Kept {
    fn from(request: FetchRequest) -> Self {
        Self {
            request,
            warm: false,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/weightd".into(),
            socket: "/run/weightd/weightd.sock".into(),
            socket_uids: Vec::new(),
            store: StoreSection::default(),
            fetch: FetchSection::default(),
            warm: WarmSection::default(),
            hf: HfSection::default(),
            s3: S3Section::default(),
            file: FileSection::default(),
            access: AccessSection::default(),
            scrub: ScrubSection::default(),
            metrics: MetricsSection::default(),
            log: LogSection::default(),
            shutdown: ShutdownSection::default(),
            shared: SharedSection::default(),
            kubernetes: KubernetesSection::default(),
            controller: ControllerSection::default(),
            prefetch: Vec::new(),
        }
    }
}

/// The configuration cannot be used. The message names the file or key, and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or has a key that does not exist, or a value of the wrong type. The line itself is
    /// not shown: someone may have written a secret there.
    #[error("the configuration `{}` is wrong at line {line}, column {column}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it is wrong; the first line is 1.
        line: usize,
        /// The column there; the first is 1.
        column: usize,
        /// In which way.
        message: String,
    },
    /// A value makes no sense.
    #[error("the setting `{key}` is wrong: {reason}")]
    Value {
        /// The key, with its section.
        key: String,
        /// What is allowed.
        reason: String,
    },
    /// The Hub's settings cannot be used.
    #[error("the settings in [hf] are wrong")]
    Hf(#[from] HfConfigError),
}

fn ensure(good: bool, key: &str, reason: &str) -> Result<(), ConfigError> {
    let error = || ConfigError::Value {
        key: key.to_owned(),
        reason: reason.to_owned(),
    };
    if good { Ok(()) } else { Err(error()) }
}

impl Config {
    /// Reads the file at `path`; [`Config::check`] then checks its values.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str::<Self>(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            let last = before.rsplit('\n').next().unwrap_or_default();
            ConfigError::Parse {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: last.chars().count() + 1,
                message: error.message().to_owned(),
            }
        })
    }

    /// Checks what types alone do not.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first value that makes no sense.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_store()?;
        self.check_fetch()?;
        self.check_rest()?;
        self.hf_config()?;
        self.s3_config()?;
        self.kept().map(|_| ())
    }

    fn check_store(&self) -> Result<(), ConfigError> {
        let store = &self.store;
        ensure(self.root.is_absolute(), "root", "it is an absolute path")?;
        ensure(
            self.socket.is_absolute(),
            "socket",
            "it is an absolute path",
        )?;
        // Source: sun_path of unix(7) holds 107 bytes; the rest is for the endings of names beside it.
        ensure(
            self.socket.as_os_str().len() <= 95,
            "socket",
            "it has at most 95 bytes",
        )?;
        let marks = (1..=99).contains(&store.high_watermark_percent);
        ensure(
            marks,
            "store.high_watermark_percent",
            "it is between 1 and 99",
        )?;
        let below = (1..=store.high_watermark_percent).contains(&store.low_watermark_percent);
        ensure(
            below,
            "store.low_watermark_percent",
            "it is between 1 and the high watermark",
        )?;
        let some = store.max_bytes.is_none_or(|bytes| bytes.0 > 0);
        ensure(some, "store.max_bytes", "it is more than 0")?;
        let label = store.selinux_label.as_deref();
        ensure(
            label.is_none_or(|label| (3..=5).contains(&label.split(':').count())),
            "store.selinux_label",
            "it is user:role:type:level",
        )
    }

    fn check_fetch(&self) -> Result<(), ConfigError> {
        let fetch = &self.fetch;
        ensure(
            (1..=1024).contains(&fetch.connections),
            "fetch.connections",
            "it is between 1 and 1024",
        )?;
        let each = fetch.memory.0 / fetch.connections.max(1) as u64;
        ensure(
            each >= 64 << 10,
            "fetch.memory",
            "it is at least 64 KiB for each of fetch.connections",
        )?;
        let part = (1 << 20..=1 << 30).contains(&fetch.part.0);
        ensure(part, "fetch.part", "it is between 1 MiB and 1 GiB")?;
        ensure(
            (1..=64).contains(&fetch.files_in_flight),
            "fetch.files_in_flight",
            "it is between 1 and 64",
        )?;
        ensure(
            (1..=100).contains(&fetch.attempts),
            "fetch.attempts",
            "it is between 1 and 100",
        )?;
        let stall = (1..=600).contains(&fetch.stall_timeout.0.as_secs());
        ensure(stall, "fetch.stall_timeout", "it is between 1 s and 10 min")?;
        ensure(
            self.warm.bytes_per_second.0 >= 1 << 20,
            "warm.bytes_per_second",
            "it is at least 1 MiB",
        )?;
        ensure(
            (1..=90).contains(&self.warm.max_memory_percent),
            "warm.max_memory_percent",
            "it is between 1 and 90",
        )
    }

    fn check_rest(&self) -> Result<(), ConfigError> {
        let interval = self.scrub.interval.0;
        ensure(
            interval.is_zero() || interval >= Duration::from_secs(60),
            "scrub.interval",
            "it is 0s or at least 1 min",
        )?;
        ensure(
            self.scrub.bytes_per_second.0 > 0,
            "scrub.bytes_per_second",
            "it is more than 0",
        )?;
        let region = self.s3.region.as_deref();
        ensure(
            region.is_none_or(|region| !region.trim().is_empty()),
            "s3.region",
            "it is not empty; leave it away to let the environment choose",
        )?;
        let absolute = self.file.allow.iter().all(|path| path.is_absolute());
        ensure(absolute, "file.allow", "all are absolute paths")?;
        self.policy()?;
        self.check_shared()?;
        self.check_kubernetes()?;
        self.check_controller()?;
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log.level);
        ensure(
            filter.is_ok(),
            "log.level",
            "it is error, warn, info, debug, trace or a filter of RUST_LOG's form",
        )?;
        Ok(())
    }

    /// Checks the settings of the shared tier.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] for the first that makes no sense.
    pub fn check_shared(&self) -> Result<(), ConfigError> {
        let shared = &self.shared;
        let absolute = shared.root.as_ref().is_none_or(|root| root.is_absolute());
        ensure(absolute, "shared.root", "it is an absolute path")?;
        let inside = |root: &PathBuf| root.starts_with(&self.root) || self.root.starts_with(root);
        ensure(
            !shared.root.as_ref().is_some_and(inside),
            "shared.root",
            "it does not lie in the store's root, nor the other way round",
        )?;
        let segment = shared.segment.is_none_or(|bytes| is_segment(bytes.0));
        ensure(
            segment,
            "shared.segment",
            "it is a multiple of 1 MiB, and at most 64 GiB",
        )?;
        let (claim, stall) = (shared.claim_timeout.0, shared.stall_timeout.0);
        ensure(
            (2..=3600).contains(&claim.as_secs()),
            "shared.claim_timeout",
            "it is between 2 s and 1 h",
        )?;
        ensure(
            (1..=120).contains(&stall.as_secs()),
            "shared.stall_timeout",
            "it is between 1 s and 2 min",
        )
    }

    fn check_kubernetes(&self) -> Result<(), ConfigError> {
        let kubernetes = &self.kubernetes;
        let name = kubernetes.node.as_deref();
        ensure(
            name.is_none_or(|name| !name.trim().is_empty()),
            "kubernetes.node",
            "it is not empty; leave it away where there is no cluster",
        )?;
        let absolute = |path: &PathBuf| path.is_absolute();
        ensure(
            kubernetes.kubeconfig.as_ref().is_none_or(absolute),
            "kubernetes.kubeconfig",
            "it is an absolute path",
        )?;
        ensure(
            kubernetes.labels <= 64,
            "kubernetes.labels",
            "it is at most 64",
        )
    }

    fn check_controller(&self) -> Result<(), ConfigError> {
        let controller = &self.controller;
        ensure(
            !controller.service.is_empty(),
            "controller.service",
            "it is not empty",
        )?;
        let absolute = |path: &PathBuf| path.is_absolute();
        ensure(
            controller.certificate_dir.as_ref().is_none_or(absolute),
            "controller.certificate_dir",
            "it is an absolute path",
        )?;
        ensure(
            (1..=16).contains(&controller.fills),
            "controller.fills",
            "it is between 1 and 16",
        )
    }

    /// The shared tier, if there is one.
    #[must_use]
    pub fn shared_config(&self) -> Option<SharedConfig> {
        let shared = &self.shared;
        Some(SharedConfig {
            egress: match shared.egress {
                EgressPolicy::Once => Egress::Once,
                EgressPolicy::Fastest => Egress::Fastest,
            },
            options: SharedOptions {
                segment_bytes: shared.segment.map(|bytes| bytes.0),
                file_system: shared.filesystem.clone(),
            },
            claim_timeout: shared.claim_timeout.0,
            stall_timeout: shared.stall_timeout.0,
            root: shared.root.clone()?,
        })
    }

    /// The store's limits.
    #[must_use]
    pub fn store_limits(&self) -> StoreLimits {
        StoreLimits {
            high_percent: self.store.high_watermark_percent,
            low_percent: self.store.low_watermark_percent,
            max_bytes: self.store.max_bytes.map(|bytes| bytes.0),
            keep_partial: self.store.keep_partial.0,
        }
    }

    /// The fetcher's limits.
    #[must_use]
    pub fn fetch_limits(&self) -> FetchLimits {
        FetchLimits {
            connections: self.fetch.connections,
            memory_bytes: self.fetch.memory.0,
            part_bytes: self.fetch.part.0,
            files_in_flight: self.fetch.files_in_flight,
            attempts: self.fetch.attempts,
            stall_timeout: self.fetch.stall_timeout.0,
            ..FetchLimits::default()
        }
    }

    /// The warmer's limits.
    #[must_use]
    pub fn warm_limits(&self) -> WarmLimits {
        WarmLimits {
            bytes_per_second: self.warm.bytes_per_second.0,
            max_memory_percent: self.warm.max_memory_percent,
        }
    }

    /// How the Hub is reached: what the file says, and the environment for the rest.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Hf`] or [`ConfigError::Value`].
    pub fn hf_config(&self) -> Result<HfConfig, ConfigError> {
        let endpoint = self.hf.endpoint.as_deref().map(|endpoint| {
            url::Url::parse(endpoint).map_err(|error| ConfigError::Value {
                key: "hf.endpoint".to_owned(),
                reason: format!("it is a web address ({error})"),
            })
        });
        let token = self.hf.token_file.as_deref().map(|path| {
            let text = std::fs::read_to_string(path);
            text.map(SecretString::from)
                .map_err(|source| HfConfigError::TokenFile {
                    path: path.to_owned(),
                    source,
                })
        });
        let config = HfConfig::from_env_unless(endpoint.transpose()?, token.transpose()?);
        Ok(config?)
    }

    /// How S3 is reached, and as whom.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] if the endpoint is no web address.
    pub fn s3_config(&self) -> Result<S3Config, ConfigError> {
        let endpoint = self.s3.endpoint.as_deref().map(|endpoint| {
            let url = url::Url::parse(endpoint).ok();
            let good = |url: &url::Url| {
                let plain = url.username().is_empty() && url.password().is_none();
                let bare = url.query().is_none() && url.fragment().is_none();
                matches!(url.scheme(), "http" | "https") && url.has_host() && plain && bare
            };
            url.filter(good).ok_or_else(|| ConfigError::Value {
                key: "s3.endpoint".to_owned(),
                reason: "it begins with https:// or http:// and a host, and holds no user name, password, query or fragment".to_owned(),
            })
        });
        Ok(S3Config {
            endpoint: endpoint.transpose()?,
            region: self.s3.region.clone(),
            identity: if self.s3.anonymous {
                S3Identity::Nobody
            } else {
                S3Identity::Chain
            },
            unsigned_buckets: self.s3.unsigned_buckets.clone(),
            believe_metadata: false,
            look_at_all: self.shared_config().is_some(),
        })
    }

    /// Which namespaces may use which models.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] for a rule that is no glob, or can match nothing.
    pub fn policy(&self) -> Result<Policy, ConfigError> {
        let policy = Policy::new(&self.access.allow, &self.access.deny);
        policy.map_err(|error| ConfigError::Value {
            key: error.key.to_owned(),
            reason: error.to_string(),
        })
    }

    /// How long the rights to models are remembered.
    #[must_use]
    pub fn access_limits(&self) -> AccessLimits {
        AccessLimits {
            remember: self.access.remember.0,
            when_unreachable: self.access.when_unreachable,
            unreachable_window: self.access.unreachable_window.0,
            patience: PATIENCE,
        }
    }

    /// The models to keep here.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] for patterns or a pin that make no sense.
    pub fn kept(&self) -> Result<Vec<Kept>, ConfigError> {
        let one = |entry: &Prefetch| -> Result<Kept, String> {
            let patterns = Patterns::new(entry.include.clone(), entry.exclude.clone());
            let pin = entry.pin.as_deref().map(Holder::operator).transpose();
            let request = FetchRequest {
                model: entry.model.clone(),
                patterns: patterns.map_err(|error| error.to_string())?,
                pin: pin.map_err(|error| error.to_string())?,
            };
            let warm = entry.warm;
            Ok(Kept { request, warm })
        };
        let wrong = |reason| ConfigError::Value {
            key: "prefetch".to_owned(),
            reason,
        };
        self.prefetch
            .iter()
            .map(|entry| one(entry).map_err(wrong))
            .collect()
    }
}

/// Every key with its value as it is written in TOML; a section's keys have its name before them.
#[must_use]
pub fn flatten(config: &Config) -> BTreeMap<String, String> {
    fn walk(prefix: &str, value: &toml::Value, keys: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let key = if prefix.is_empty() {
                        key.clone()
                    } else {
                        format!("{prefix}.{key}")
                    };
                    walk(&key, value, keys);
                }
            }
            value => {
                keys.insert(prefix.to_owned(), value.to_string());
            }
        }
    }
    let mut keys = BTreeMap::new();
    let value = toml::Value::try_from(config).expect("a configuration is TOML");
    walk("", &value, &mut keys);
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weightd.toml");
        std::fs::write(&path, text).unwrap();
        let config = Config::read(&path).and_then(|config| config.check().map(|()| config));
        config.map_err(|error| weightd_core::errors::Chain(&error).to_string())
    }

    #[test]
    fn the_defaults_are_sound() {
        parse("").unwrap();
    }

    #[test]
    fn values_are_written_as_people_write_them() {
        let config = parse(
            r#"
            root = "/data/weightd"
            [store]
            max_bytes = "1.5TiB"
            [fetch]
            memory = 33554432
            stall_timeout = "1 min"
            [[prefetch]]
            model = "hf://org/model@main"
            exclude = ["*.py"]
            pin = "serving"
            warm = true
            [warm]
            bytes_per_second = "2GiB"
            max_memory_percent = 25
            "#,
        )
        .unwrap();
        assert_eq!(config.store_limits().max_bytes, Some(3 << 39));
        assert_eq!(config.fetch_limits().memory_bytes, 32 << 20);
        assert_eq!(config.fetch_limits().stall_timeout, Duration::from_secs(60));
        let kept = &config.kept().unwrap()[0];
        let pin = kept.request.pin.as_ref().unwrap();
        assert_eq!(pin.to_string(), "operator/serving");
        assert!(kept.warm);
        let warm = config.warm_limits();
        assert_eq!(
            (warm.bytes_per_second, warm.max_memory_percent),
            (2 << 30, 25)
        );
    }

    #[test]
    fn a_mistake_is_named_with_what_is_allowed() {
        for (text, words) in [
            ("rooot = '/x'", &["unknown field `rooot`", "line 1"][..]),
            ("[store]\nhigh = 3", &["unknown field `high`"]),
            ("root = 'x'", &["`root`", "absolute"]),
            (
                &format!("socket = '/{}'", "x".repeat(95)),
                &["`socket`", "95 bytes"],
            ),
            (
                "[store]\nhigh_watermark_percent = 60",
                &["store.low_watermark_percent"],
            ),
            (
                "[store]\nhigh_watermark_percent = 100",
                &["store.high_watermark_percent", "99"],
            ),
            ("[store]\nmax_bytes = '3 bananas'", &["bananas", "GiB"]),
            ("[fetch]\nconnections = 0", &["fetch.connections", "1024"]),
            ("[fetch]\nmemory = '1MiB'", &["fetch.memory"]),
            ("[fetch]\nstall_timeout = 'soon'", &["soon"]),
            ("[hf]\nendpoint = 'ftp://x'", &["endpoint"]),
            ("[hf]\ntoken_file = '/nowhere/token'", &["/nowhere/token"]),
            ("[store]\nmax_bytes = 0", &["store.max_bytes"]),
            ("[scrub]\ninterval = '59s'", &["scrub.interval", "1 min"]),
            ("[s3]\nendpoint = 'x'", &["s3.endpoint"]),
            ("[s3]\nendpoint = 'http://:pw@host'", &["s3.endpoint"]),
            ("[s3]\nendpoint = 'http://host/?a=b'", &["s3.endpoint"]),
            ("[s3]\nendpoint = 'http://host/#a'", &["s3.endpoint"]),
            ("[s3]\nregion = ''", &["s3.region"]),
            (
                "[[access.deny]]\nsource = 'org/secret'",
                &["access.deny", "`org/secret`", "hf://"],
            ),
            (
                "[[access.allow]]\nsource = 's3://models/'",
                &["access.allow", "`s3://models/*`"],
            ),
            ("[log]\nformat = 'xml'", &["xml"]),
            ("[metrics]\nlisten = '9100'", &["line 2", "socket address"]),
            ("[[prefetch]]\nmodel = 'org/model'", &["hf://org/model"]),
            (
                "[[prefetch]]\nmodel = 'hf://org/model'\npin = 'a/b'",
                &["prefetch", "a/b"],
            ),
        ] {
            refused(text, words);
        }
    }

    #[test]
    fn a_mistake_about_warming_is_named_with_what_is_allowed() {
        refused(
            "[warm]\nbytes_per_second = '1KiB'",
            &["warm.bytes_per_second", "1 MiB"],
        );
        refused(
            "[warm]\nmax_memory_percent = 91",
            &["warm.max_memory_percent", "90"],
        );
    }

    #[track_caller]
    fn refused(text: &str, words: &[&str]) {
        let error = parse(text).expect_err(text);
        for word in words {
            assert!(
                error.contains(word),
                "`{word}` is missing for {text}: {error}"
            );
        }
    }

    #[test]
    fn a_secret_in_a_wrong_place_is_not_shown() {
        for text in [
            "[hf]\ntoken = 'hf_secret'",
            "[hf]\ntoken_file = hf_secret",
            "[hf]\ntoken_file = 'hf_secret",
            "[s3]\nendpoint = 'http://me:hf_secret@host'",
        ] {
            let error = parse(text).expect_err(text);
            assert!(!error.contains("secret"), "{error}");
        }
        let error = parse("[hf]\n  token = 'hf_secret'").unwrap_err();
        assert!(
            error.contains("line 2, column 3: unknown field `token`"),
            "{error}"
        );
    }

    #[test]
    fn every_setting_is_described_with_its_default() {
        // Keys without a default are not part of the serialised one.
        let mut keys = flatten(&Config::default());
        for key in [
            "store.max_bytes",
            "store.selinux_label",
            "hf.endpoint",
            "hf.token_file",
            "s3.endpoint",
            "s3.region",
            "metrics.listen",
            "shared.root",
            "shared.filesystem",
            "shared.segment",
            "kubernetes.node",
            "kubernetes.kubeconfig",
            "controller.webhook",
            "controller.certificate_dir",
        ] {
            assert!(
                keys.insert(key.to_owned(), String::new()).is_none(),
                "{key} has a default"
            );
        }
        let described: BTreeMap<String, String> = SETTINGS
            .iter()
            .map(|setting| (setting.key.to_owned(), setting.default.to_owned()))
            .collect();
        assert_eq!(described, keys);
    }
}
