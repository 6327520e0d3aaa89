//! What each setting means: the README's table is compared with this one.

/// One key of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// The key, with its section before it.
    pub key: &'static str,
    /// Its default as it is written in TOML; empty if there is none.
    pub default: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

macro_rules! settings {
    ($($key:literal = $default:literal: $meaning:literal;)*) => {
        /// Every setting of the daemon.
        pub const SETTINGS: &[Setting] = &[$(Setting { key: $key, default: $default, meaning: $meaning }),*];
    };
}

settings! {
    "root" = "\"/var/lib/weightd\"": "Directory of the store, on local NVMe";
    "socket" = "\"/run/weightd/weightd.sock\"": "Unix socket of the control API, at most 95 bytes; mode 0600, or 0666 with socket_uids";
    "socket_uids" = "[]": "Users, beside root and the daemon's own, whose processes may use the socket; all others are refused as they connect";
    "store.high_watermark_percent" = "80": "Evict when the file system would be fuller than this";
    "store.low_watermark_percent" = "70": "Evict until the file system is no fuller than this";
    "store.max_bytes" = "": "The most that the store may hold, such as \"1.5TiB\"; unset: as much as the watermarks allow";
    "store.keep_partial" = "\"168h\"": "Keep a partial download that nobody goes on with, and the request for a fetch that has not succeeded, for so long";
    "store.selinux_label" = "": "SELinux label that the daemon gives to the store, so that pods may read it, such as \"system_u:object_r:container_file_t:s0\"; unset: what its directory has";
    "fetch.connections" = "64": "Most ranged reads at once, of all fetches together; fewer go while more bring no more, or the origin pushes back";
    "fetch.memory" = "\"48MiB\"": "Bytes that may have arrived and wait to be written or hashed, of all fetches together";
    "fetch.part" = "\"8MiB\"": "Bytes of one ranged read, at most: where a file has many at once they are shorter, so that what they bring has room in memory";
    "fetch.files_in_flight" = "8": "Large files worked on at once, of one fetch, and four times as many of all together; each is hashed by one core at most, and two side by side in little more time than one";
    "fetch.attempts" = "6": "Tries of one read or question that bring nothing";
    "fetch.stall_timeout" = "\"15s\"": "Replace a connection over which nothing arrives for so long";
    "warm.bytes_per_second" = "\"1GiB\"": "How fast models that are to be warm are read from the disk, at least 1 MiB";
    "warm.max_memory_percent" = "50": "How much of the memory that is available, and that the limits of the daemon's control group leave, warm models may take together, between 1 and 90";
    "hf.endpoint" = "": "Address of the Hub; unset: HF_ENDPOINT, else https://huggingface.co";
    "hf.token_file" = "": "File that holds the daemon's own Hub token; unset: HF_TOKEN, HF_TOKEN_PATH";
    "s3.endpoint" = "": "Address of S3; unset: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, else AWS";
    "s3.region" = "": "Region; unset: AWS_REGION or the profile's, else what the bucket says";
    "s3.anonymous" = "false": "Never sign requests: only public buckets can be read";
    "s3.unsigned_buckets" = "[]": "Public buckets that are read without credentials";
    "file.allow" = "[]": "Directories that file:// models may lie below";
    "access.allow" = "[]": "Which namespaces may use which models in volumes: tables with source and namespace, both globs; if there are any, all else is denied";
    "access.deny" = "[]": "Which namespaces may not use which models; beats access.allow";
    "access.remember" = "\"10min\"": "How long an origin's word that a requester may read a model holds without asking again";
    "access.when_unreachable" = "\"remembered\"": "Who gets a model in a volume while its origin cannot be asked: remembered (who was let in within the window), deny, or allow (access.allow and access.deny alone decide)";
    "access.unreachable_window" = "\"1h\"": "How old the origin's word may be then";
    "scrub.interval" = "\"168h\"": "Hash the whole store again this often, at least a minute; \"0s\" never";
    "scrub.bytes_per_second" = "\"50MiB\"": "How fast the scrub reads";
    "metrics.listen" = "": "Address for /metrics, /healthz and /readyz, such as \"0.0.0.0:9808\"; unset: none";
    "log.format" = "\"auto\"": "text, json, or auto: text on a terminal, else JSON";
    "log.level" = "\"info\"": "error, warn, info, debug, trace, or a filter as RUST_LOG has it";
    "shutdown.deadline" = "\"20s\"": "How long SIGTERM lets requests and fetches end";
    "shared.root" = "": "Directory of the shared tier, on a file system that all nodes mount; unset: none";
    "shared.egress" = "\"once\"": "How often a byte may leave its origin: once for all nodes, or fastest (as often as it takes)";
    "shared.filesystem" = "": "The type that the shared tier's file system must have, such as \"lustre\": else a mount that is missing would fill the node's own disk; unset: any";
    "shared.segment" = "": "Bytes that a node claims at a time, for a store that is made anew; unset: 256 MiB";
    "shared.claim_timeout" = "\"15s\"": "Take over what a node claimed and does not go on with for so long";
    "shared.stall_timeout" = "\"5s\"": "Leave the shared tier out when it does not answer for so long";
    "prefetch" = "[]": "Models to bring at start: tables with model, include, exclude, pin, and warm (read it into the page cache then)";
    "kubernetes.node" = "": "Name of this machine's Node object, which turns on the work for Kubernetes; also --node-name, NODE_NAME";
    "kubernetes.kubeconfig" = "": "How to reach the API server; unset: the pod's service account";
    "kubernetes.driver" = "\"csi.weightd.io\"": "Name of the CSI driver: its startup taint ends in /agent-not-ready";
    "kubernetes.startup_taint" = "true": "Remove the startup taint when the node's CSINode lists the driver";
    "kubernetes.warming_timeout" = "\"10min\"": "Remove the taint weightd.io/warming after so long, also when the warm set is not complete";
    "kubernetes.labels" = "16": "Models, most recently used first, that the Node says it has in labels below model.weightd.io/, for preferred placement; 0: none";
    "kubernetes.warm_set" = "true": "Keep what the Node's annotation weightd.io/prefetch and the ModelPrefetch objects name";
    "controller.webhook" = "": "Address at which `weightd controller` serves the admission webhook, such as \"0.0.0.0:8443\"; unset: none";
    "controller.service" = "\"weightd-webhook\"": "Name of the Service before the webhook, which its certificate is for";
    "controller.certificate_dir" = "": "Directory with tls.crt and tls.key for the webhook, read again when they change; unset: the controller makes its own certificate";
    "controller.certificate_names" = "[]": "More host names or addresses that its own certificate is for";
    "controller.pending" = "true": "Fill the shared tier for pods that wait for a node; needs shared.root";
    "controller.fills" = "2": "Models that are filled at once, between 1 and 16; each has its share of fetch.connections and fetch.memory";
    "controller.own_credentials" = "false": "Fill also models that pods read with a Secret, with the controller's own credentials, if access.allow names model and namespace";
}
