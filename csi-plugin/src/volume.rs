//! What a publish request asks for, checked: nothing that a pod's author writes says *where* anything is.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use tonic::Status;
use weightd_proto::csi::v1::NodePublishVolumeRequest;
use weightd_proto::csi::v1::volume_capability::AccessType;
use weightd_proto::csi::v1::volume_capability::access_mode::Mode as AccessMode;
use weightd_proto::weightd::v1::acquire_request::Layout;
use weightd_proto::weightd::v1::{AcquireRequest, Credentials, ModelSpec};

use crate::pod::PodName;

/// What kubelet says of the pod. Its keys overwrite whatever a pod's author wrote under these names.
///
/// Source: kubelet's `csi_plugin.go`, `mergePodInfo`.
const KUBELET: &str = "csi.storage.k8s.io/";

/// The attributes that a volume may have.
const ATTRIBUTES: [&str; 7] = [
    "source", "revision", "include", "exclude", "layout", "mode", "warm",
];

/// Where a volume is to appear, and by which name the daemon knows its holder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// The directory, without symlinks up to the pods' directory.
    pub path: PathBuf,
    /// `csi/<pod uid>.<volume>`, or `csi/path-<digest>` if that is no name. It follows from the path alone:
    /// one persistent volume may be mounted by several pods, and an unmount or a restart knows no more than
    /// the path.
    pub holder: String,
    /// The pod whose directory it is.
    pub pod_uid: String,
    /// The volume's name: in the pod, or of the persistent volume.
    pub volume: String,
}

/// The directory below which kubelet wants volumes.
#[derive(Debug, Clone)]
pub struct KubeletDir {
    /// As kubelet writes it.
    given: PathBuf,
    /// As the kernel writes it.
    real: PathBuf,
    /// As the kernel writes its `pods`, which may be a symlink.
    pods: PathBuf,
}

impl KubeletDir {
    /// `dir` must be there.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let real = dir.canonicalize()?;
        let pods = real.join("pods");
        let pods = match pods.canonicalize() {
            // A node's first pod may be yet to come.
            Err(error) if error.kind() == io::ErrorKind::NotFound => pods,
            found => found?,
        };
        Ok(Self {
            given: dir.to_owned(),
            real,
            pods,
        })
    }

    /// Whether kubelet has pods here. A node always has: the plugin is in one.
    #[must_use]
    pub fn has_pods(&self) -> bool {
        std::fs::read_dir(&self.pods).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Checks a target path.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT` unless it is where kubelet has a volume of a pod:
    /// `pods/<uid>/volumes/kubernetes.io~csi/<volume>/mount`.
    pub fn target(&self, path: &str) -> Result<Target, Status> {
        if path.is_empty() {
            return Err(Status::invalid_argument("the request has no target path"));
        }
        self.known(Path::new(path)).ok_or_else(|| {
            Status::invalid_argument(format!(
                "the target path `{path}` is none of a pod's volume below `{}/pods`\nhint: if kubelet's directory is \
                 another one, start weightd-csi with --kubelet-dir",
                self.given.display()
            ))
        })
    }

    /// The target at `path`, if it is one.
    #[must_use]
    pub fn known(&self, path: &Path) -> Option<Target> {
        let inside = |dir: &Path| path.strip_prefix(dir.join("pods")).ok();
        let below = path.strip_prefix(&self.pods).ok();
        let below = below
            .or_else(|| inside(&self.given))
            .or_else(|| inside(&self.real))?;
        let parts: Option<Vec<&str>> = below
            .components()
            .map(|part| match part {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        match parts?.as_slice() {
            [uid, "volumes", "kubernetes.io~csi", volume, leaf] => Some(Target {
                path: self.pods.join(below),
                holder: holder(uid, volume, leaf, below),
                pod_uid: (*uid).to_owned(),
                volume: (*volume).to_owned(),
            }),
            _ => None,
        }
    }
}

/// No two targets have one holder: no uid has a dot.
fn holder(uid: &str, volume: &str, leaf: &str, below: &Path) -> String {
    let name = format!("{uid}.{volume}");
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let plain = name.len() <= 128 && !name.starts_with('.') && name.chars().all(allowed);
    if plain && !uid.contains('.') && leaf == "mount" {
        return format!("csi/{name}");
    }
    let digest = Sha256::digest(below.as_os_str().as_encoded_bytes());
    let hex = digest.iter().take(20).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    format!("csi/path-{hex}")
}

/// The pod's uid and the volume's name that a holder stands for; `None` if it does not say.
pub(crate) fn of_holder(holder: &str) -> Option<(&str, &str)> {
    holder.strip_prefix("csi/")?.split_once('.')
}

/// A publish request that may be carried out.
pub struct Volume {
    /// Where to.
    pub target: Target,
    /// Whose it is, as far as kubelet vouches for it.
    pub pod: Option<PodName>,
    source: Option<String>,
    revision: Option<String>,
    include: Vec<String>,
    exclude: Vec<String>,
    layout: Layout,
    at_once: bool,
    warm: bool,
    credentials: Credentials,
}

impl Volume {
    /// Checks a request.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT` with what is wrong, and what would be right.
    pub fn parse(request: NodePublishVolumeRequest, kubelet: &KubeletDir) -> Result<Self, Status> {
        if request.volume_id.is_empty() {
            return Err(Status::invalid_argument("the request has no volume id"));
        }
        let target = kubelet.target(&request.target_path)?;
        check_capability(&request)?;
        let mut context = request.volume_context;
        let pod = pod(&context, &target)?;
        context.retain(|key, _| !key.starts_with(KUBELET));
        if let Some(unknown) = context
            .keys()
            .find(|key| !ATTRIBUTES.contains(&key.as_str()))
        {
            return Err(Status::invalid_argument(format!(
                "the volume has the attribute `{unknown}`, which there is not\nhint: there are {}",
                ATTRIBUTES.join(", ")
            )));
        }
        let mut take = |key: &str| {
            let text = context.remove(key)?;
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        Ok(Self {
            target,
            pod,
            source: take("source"),
            revision: take("revision"),
            include: globs(take("include").as_deref()),
            exclude: globs(take("exclude").as_deref()),
            layout: match take("layout").as_deref() {
                None | Some("flat") => Layout::Flat,
                Some("hf-cache") => Layout::HfCache,
                Some(other) => return Err(choice("layout", other, "flat or hf-cache")),
            },
            at_once: match take("mode").as_deref() {
                None | Some("wait") => false,
                Some("async") => true,
                Some(other) => return Err(choice("mode", other, "wait or async")),
            },
            warm: match take("warm").as_deref() {
                None | Some("true") => true,
                Some("false") => false,
                Some(other) => return Err(choice("warm", other, "true or false")),
            },
            credentials: credentials(request.secrets)?,
        })
    }

    /// Whether the pod's annotations must say which model it is.
    #[must_use]
    pub fn needs_annotation(&self) -> bool {
        self.source.is_none()
    }

    /// What to ask the daemon for. `annotation` is the model that the pod names; attributes win over it.
    ///
    /// # Errors
    ///
    /// `INVALID_ARGUMENT` if nothing names a model, or two revisions are named.
    pub fn request(self, annotation: Option<&str>) -> Result<AcquireRequest, Status> {
        let name = &self.target.volume;
        let Some(source) = self.source.as_deref().or(annotation) else {
            return Err(nothing_named(name, self.pod.is_some()));
        };
        let model = match (&self.revision, source.split_once('@')) {
            (Some(_), Some(_)) if self.source.is_some() => {
                return Err(Status::invalid_argument(format!(
                    "`{source}` names a revision, and so does the attribute `revision`\nhint: keep one of them"
                )));
            }
            // Attributes win over annotations.
            (Some(revision), Some((name, _))) => format!("{name}@{revision}"),
            (Some(revision), None) => format!("{source}@{revision}"),
            (None, _) => source.to_owned(),
        };
        Ok(AcquireRequest {
            model: Some(ModelSpec {
                model,
                include: self.include,
                exclude: self.exclude,
            }),
            holder: self.target.holder,
            layout: self.layout.into(),
            at_once: self.at_once,
            namespace: self.pod.map(|pod| pod.namespace).unwrap_or_default(),
            credentials: Some(self.credentials),
            mounted: false,
            warm: self.warm,
        })
    }

    /// What to ask the daemon for when the volume's own directory is mounted, but not complete: the rest of what
    /// it was opened for, whatever attributes and annotations say by now.
    #[must_use]
    pub fn rest(self) -> AcquireRequest {
        AcquireRequest {
            holder: self.target.holder,
            namespace: self.pod.map(|pod| pod.namespace).unwrap_or_default(),
            credentials: Some(self.credentials),
            mounted: true,
            warm: self.warm,
            ..AcquireRequest::default()
        }
    }
}

fn nothing_named(volume: &str, pod_known: bool) -> Status {
    let hint = if pod_known {
        format!(
            "set the volume attribute `source`, or annotate the pod with weightd.io/volume.{volume} or weightd.io/model"
        )
    } else {
        "set the volume attribute `source`; annotations are read only if the CSIDriver object has podInfoOnMount: true"
            .to_owned()
    };
    Status::invalid_argument(format!(
        "neither the volume nor its pod says which model to mount\nhint: {hint}"
    ))
}

fn choice(key: &str, given: &str, allowed: &str) -> Status {
    Status::invalid_argument(format!("the volume's {key} is `{given}`: it is {allowed}"))
}

fn check_capability(request: &NodePublishVolumeRequest) -> Result<(), Status> {
    let Some(capability) = &request.volume_capability else {
        return Err(Status::invalid_argument(
            "the request has no volume capability",
        ));
    };
    if let Some(AccessType::Block(_)) = capability.access_type {
        return Err(Status::invalid_argument(
            "a model is a directory of files, not a block device\nhint: leave volumeMode out, or say Filesystem",
        ));
    }
    let mode = capability.access_mode.unwrap_or_default().mode();
    let reader = matches!(
        mode,
        AccessMode::SingleNodeReaderOnly | AccessMode::MultiNodeReaderOnly
    );
    if !request.readonly && !reader {
        return Err(Status::invalid_argument(
            "a model can be mounted read-only, not for writing\nhint: say readOnly: true in the pod's csi volume, or \
             accessModes: [ReadOnlyMany] in the persistent volume",
        ));
    }
    Ok(())
}

/// The pod that kubelet vouches for. Its uid is also part of the target path, which nobody but kubelet
/// chooses: if the two differ, somebody else wrote these keys.
pub(crate) fn pod(
    context: &HashMap<String, String>,
    target: &Target,
) -> Result<Option<PodName>, Status> {
    let get = |key: &str| context.get(&format!("{KUBELET}{key}")).cloned();
    let (Some(uid), Some(name), Some(namespace)) =
        (get("pod.uid"), get("pod.name"), get("pod.namespace"))
    else {
        return Ok(None);
    };
    if target.pod_uid != uid {
        return Err(Status::invalid_argument(format!(
            "the volume says that it belongs to pod {uid}, its target path to another\nhint: only kubelet sets \
             {KUBELET}*: has the CSIDriver object podInfoOnMount: true?"
        )));
    }
    Ok(Some(PodName {
        namespace,
        name,
        uid,
    }))
}

/// Globs, separated by commas, white space or line breaks. A comma between braces belongs to its glob.
fn globs(text: Option<&str>) -> Vec<String> {
    let mut depth = 0_u32;
    let parts = text.unwrap_or_default().split(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c.is_whitespace() || (c == ',' && depth == 0)
    });
    parts
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect()
}

fn credentials(mut secrets: HashMap<String, String>) -> Result<Credentials, Status> {
    // What kubelet adds, such as the tokens of a service account, is not from the Secret.
    secrets.retain(|key, _| !key.starts_with(KUBELET));
    let mut take = |key: &str| secrets.remove(key).unwrap_or_default();
    let (hf_token, token) = (take("hf-token"), take("token"));
    let credentials = Credentials {
        hf_token: if hf_token.is_empty() { token } else { hf_token },
        aws_access_key_id: take("aws-access-key-id"),
        aws_secret_access_key: take("aws-secret-access-key"),
        aws_session_token: take("aws-session-token"),
    };
    // A Secret may hold other things beside ours; only one with none of ours is a mistake.
    let nothing = [
        &credentials.hf_token,
        &credentials.aws_access_key_id,
        &credentials.aws_secret_access_key,
    ]
    .iter()
    .all(|text| text.is_empty());
    if nothing && !secrets.is_empty() {
        return Err(Status::invalid_argument(
            "the volume's Secret has none of the keys hf-token, token, aws-access-key-id, aws-secret-access-key, \
             aws-session-token",
        ));
    }
    Ok(credentials)
}

#[cfg(test)]
mod tests {
    use weightd_proto::csi::v1::VolumeCapability;
    use weightd_proto::csi::v1::volume_capability::{
        AccessMode as Access, BlockVolume, MountVolume,
    };

    use super::*;

    const TARGET: &str = "/pods/0c1f-4a/volumes/kubernetes.io~csi/model/mount";

    fn kubelet() -> (tempfile::TempDir, KubeletDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let kubelet = KubeletDir::new(dir.path()).expect("kubelet's");
        (dir, kubelet)
    }

    fn request(dir: &tempfile::TempDir, context: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let mode = AccessMode::SingleNodeWriter.into();
        let pairs = context
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        NodePublishVolumeRequest {
            volume_id: "csi-1".to_owned(),
            target_path: format!("{}{TARGET}", dir.path().display()),
            readonly: true,
            volume_capability: Some(VolumeCapability {
                access_mode: Some(Access { mode }),
                access_type: Some(AccessType::Mount(MountVolume::default())),
            }),
            volume_context: pairs.collect(),
            ..NodePublishVolumeRequest::default()
        }
    }

    #[track_caller]
    fn refused(request: NodePublishVolumeRequest, kubelet: &KubeletDir, words: &str) {
        let error = Volume::parse(request, kubelet).err().expect("accepted");
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(error.message().contains(words), "{error}");
    }

    #[test]
    fn attributes_say_what_to_mount() {
        let (dir, kubelet) = kubelet();
        let request = request(
            &dir,
            &[
                ("source", "hf://org/model"),
                ("revision", "v1"),
                ("include", "*.{json,txt}, *.safetensors\n*.model"),
                ("layout", "hf-cache"),
                ("mode", "async"),
                ("warm", "true"),
                ("csi.storage.k8s.io/pod.uid", "0c1f-4a"),
                ("csi.storage.k8s.io/pod.name", "pod"),
                ("csi.storage.k8s.io/pod.namespace", "team-a"),
                ("csi.storage.k8s.io/ephemeral", "true"),
            ],
        );

        let asked = Volume::parse(request, &kubelet)
            .unwrap()
            .request(Some("hf://other/one"));

        let asked = asked.unwrap();
        let model = asked.model.as_ref().expect("a model");
        assert_eq!(model.model, "hf://org/model@v1");
        assert_eq!(model.include, ["*.{json,txt}", "*.safetensors", "*.model"]);
        assert_eq!(asked.holder, "csi/0c1f-4a.model");
        assert_eq!(asked.namespace, "team-a");
        assert!(asked.at_once && asked.warm && asked.layout() == Layout::HfCache);
    }

    #[test]
    fn what_is_not_a_read_only_directory_of_a_model_is_refused() {
        let (dir, kubelet) = kubelet();
        let good = || request(&dir, &[("source", "hf://org/model")]);
        assert!(Volume::parse(good(), &kubelet).is_ok());

        let written = NodePublishVolumeRequest {
            readonly: false,
            ..good()
        };
        refused(written, &kubelet, "read-only");
        let mut block = good();
        if let Some(capability) = &mut block.volume_capability {
            capability.access_type = Some(AccessType::Block(BlockVolume {}));
        }
        refused(block, &kubelet, "block");
        for key in ["root", "path", "endpoint", "cacheRoot", "uid", "Source"] {
            refused(request(&dir, &[(key, "/etc")]), &kubelet, key);
        }
        refused(request(&dir, &[("layout", "zip")]), &kubelet, "hf-cache");
        refused(request(&dir, &[("mode", "stream")]), &kubelet, "async");
        refused(request(&dir, &[("warm", "yes")]), &kubelet, "true or false");
    }

    #[test]
    fn a_target_outside_of_the_pods_directory_is_refused() {
        let (dir, kubelet) = kubelet();
        let base = dir.path().display();
        for path in [
            String::new(),
            "/etc".to_owned(),
            format!("{base}"),
            format!("{base}/pods"),
            format!("{base}/plugins/x"),
            format!("{base}/pods/../../etc"),
            format!("{base}/pods/x/./../../y"),
            format!("{base}/pods/x"),
            format!("{base}/pods/x/volumes/kubernetes.io~csi/model"),
            format!("{base}/pods/x/volumes/kubernetes.io~secret/model/mount"),
            format!("{base}/pods/x/volume-subpaths/model/main/0"),
            "pods/x".to_owned(),
        ] {
            let error = kubelet.target(&path).expect_err(&path);
            assert_eq!(error.code(), tonic::Code::InvalidArgument, "{path}");
        }
    }

    #[test]
    fn a_pods_directory_behind_a_symlink_is_the_one_that_the_kernel_names() {
        let elsewhere = tempfile::tempdir().expect("a directory");
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("pods");
        std::os::unix::fs::symlink(elsewhere.path(), link).expect("a symlink");
        let kubelet = KubeletDir::new(dir.path()).expect("kubelet's");
        let rest = TARGET.strip_prefix("/pods/").expect("below");

        let given = kubelet.target(&format!("{}{TARGET}", dir.path().display()));
        let mounted = kubelet.known(&elsewhere.path().join(rest));

        assert_eq!(given.ok(), mounted);
        assert!(mounted.is_some_and(|target| target.path.starts_with(elsewhere.path())));
    }

    #[test]
    fn a_revision_of_the_volume_wins_over_that_of_the_annotation() {
        let (dir, kubelet) = kubelet();
        let asked = |pairs: &[(&str, &str)], annotation| {
            let volume = Volume::parse(request(&dir, pairs), &kubelet).unwrap();
            let asked = volume.request(annotation);
            asked.map(|asked| asked.model.expect("a model").model)
        };
        let annotated = Some("hf://org/model@main");

        let both = asked(&[("revision", "v1")], annotated);

        assert_eq!(both.unwrap(), "hf://org/model@v1");
        assert_eq!(asked(&[], annotated).unwrap(), "hf://org/model@main");
        let twice = [("source", "hf://org/model@v2"), ("revision", "v1")];
        assert!(asked(&twice, annotated).is_err());
    }

    #[test]
    fn two_targets_never_share_a_holder() {
        let (_dir, kubelet) = kubelet();
        let base = kubelet.given.display().to_string();
        let long = "x".repeat(200);
        let names = [
            format!("{base}{TARGET}"),
            format!("{base}/pods/0c1f-4a/volumes/kubernetes.io~csi/model/target"),
            format!("{base}/pods/0c1f-4a/volumes/kubernetes.io~csi/{long}/mount"),
            format!("{base}/pods/a.b/volumes/kubernetes.io~csi/c/mount"),
            format!("{base}/pods/a/volumes/kubernetes.io~csi/b.c/mount"),
        ];
        let holders: std::collections::BTreeSet<String> = names
            .iter()
            .map(|name| kubelet.target(name).unwrap().holder)
            .collect();
        assert_eq!(holders.len(), names.len(), "{holders:?}");
        assert!(
            holders.iter().all(|holder| holder.len() <= 132),
            "{holders:?}"
        );
    }

    #[test]
    fn a_pod_that_kubelet_did_not_name_is_nobody() {
        let (dir, kubelet) = kubelet();
        let forged = [
            ("csi.storage.k8s.io/pod.uid", "another"),
            ("csi.storage.k8s.io/pod.name", "pod"),
            ("csi.storage.k8s.io/pod.namespace", "kube-system"),
        ];
        refused(request(&dir, &forged), &kubelet, "podInfoOnMount");
        let volume = Volume::parse(request(&dir, &forged[1..]), &kubelet).unwrap();
        assert!(volume.pod.is_none());
    }

    #[test]
    fn a_secret_without_any_of_our_keys_is_named_without_its_content() {
        let (dir, kubelet) = kubelet();
        let with = |pairs: &[(&str, &str)]| {
            let mut request = request(&dir, &[("source", "hf://org/model")]);
            let pairs = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            request.secrets = pairs.collect();
            request
        };
        refused(with(&[("password", "hunter2")]), &kubelet, "hf-token");
        let error = Volume::parse(with(&[("password", "hunter2")]), &kubelet)
            .err()
            .unwrap();
        assert!(!error.message().contains("hunter2"));
        let kubelets = [("csi.storage.k8s.io/serviceAccount.tokens", "{}")];
        assert!(Volume::parse(with(&kubelets), &kubelet).is_ok());
        for key in ["hf-token", "token"] {
            let volume = Volume::parse(with(&[(key, "hf_x"), ("note", "mine")]), &kubelet);
            let asked = volume.unwrap().request(None).unwrap();
            assert_eq!(asked.credentials.unwrap().hf_token, "hf_x");
        }
    }
}
