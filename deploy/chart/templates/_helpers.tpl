{{- define "weightd.name" -}}
{{- default "weightd" .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- end }}

{{- define "weightd.driver" -}}csi.weightd.io{{- end }}

{{/* Labels of an object: (dict "root" $ "component" "node"). */}}
{{- define "weightd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{ include "weightd.selector" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels that never change, for selectors. */}}
{{- define "weightd.selector" -}}
app.kubernetes.io/name: {{ include "weightd.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: weightd
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "weightd.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Where the daemon finds the shared tier. */}}
{{- define "weightd.sharedRoot" -}}
{{- $parts := list .Values.shared.hostPath -}}
{{- if .Values.shared.claim }}{{- $parts = append $parts "claim" }}{{- end -}}
{{- with .Values.shared.path }}{{- $parts = append $parts . }}{{- end -}}
{{- join "/" $parts -}}
{{- end }}

{{/* Not empty if the controller may fetch with its own token. */}}
{{- define "weightd.ownCredentials" -}}
{{- with .Values.config.controller }}{{ if .own_credentials }}true{{ end }}{{ end -}}
{{- end }}

{{/* An address that daemon and controller bind: (dict "address" "::" "port" 80). */}}
{{- define "weightd.listen" -}}
{{- if contains ":" .address -}}[{{ .address }}]{{- else -}}{{ .address }}{{- end -}}:{{ .port }}
{{- end }}

{{/*
weightd.toml: what operators set, and what follows from other values. Daemon and controller read the same, but for the
section [controller], which is no reason to start daemons anew: (dict "root" $ "controller" true).
*/}}
{{- define "weightd.toml" -}}
{{- $controller := .controller -}}
{{- with .root -}}
{{- $config := deepCopy .Values.config -}}
{{- $derived := dict "root" "store.hostPath" "socket" "runDir" "metrics" "metrics" -}}
{{- range $key, $value := $derived -}}
{{- if hasKey $config $key }}{{ fail (printf "config.%s is derived: set the value `%s` instead" $key $value) }}{{ end -}}
{{- end -}}
{{- range list "root" "filesystem" -}}
{{- if hasKey (default dict $config.shared) . }}{{ fail (printf "config.shared.%s is derived: set the values below `shared` instead" .) }}{{ end -}}
{{- end -}}
{{- if hasKey (default dict $config.hf) "token_file" }}{{ fail "config.hf.token_file is derived: set the value hf.tokenSecret.name instead" }}{{ end -}}
{{- $_ := set $config "root" .Values.store.hostPath -}}
{{- $_ := set $config "socket" (printf "%s/weightd.sock" .Values.runDir) -}}
{{- $_ := set $config "metrics" (dict "listen" (include "weightd.listen" .Values.metrics)) -}}
{{- if .Values.shared.enabled -}}
{{- $shared := dict "root" (include "weightd.sharedRoot" .) -}}
{{- with .Values.shared.filesystem }}{{- $_ := set $shared "filesystem" . }}{{- end -}}
{{- $_ := set $config "shared" (merge $shared (default dict $config.shared)) -}}
{{- end -}}
{{- if hasKey (default dict $config.store) "selinux_label" }}{{ fail "config.store.selinux_label is derived: set the values below `selinux` instead" }}{{ end -}}
{{- if .Values.selinux.enabled -}}
{{- $_ := set $config "store" (merge (dict "selinux_label" .Values.selinux.storeLabel) (default dict $config.store)) -}}
{{- end -}}
{{- if and .Values.hf.tokenSecret.name (or (not $controller) (include "weightd.ownCredentials" .)) -}}
{{- $_ := set $config "hf" (merge (dict "token_file" "/etc/weightd-hf/token") (default dict $config.hf)) -}}
{{- end -}}
{{- range list "webhook" "service" "certificate_dir" -}}
{{- if hasKey (default dict $config.controller) . }}{{ fail (printf "config.controller.%s is derived: set the values below `injection` instead" .) }}{{ end -}}
{{- end -}}
{{- if not $controller -}}
{{- $_ := unset $config "controller" -}}
{{- else if eq .Values.injection.mode "webhook" -}}
{{- $port := .Values.injection.webhook.port -}}
{{- $webhook := dict "webhook" (include "weightd.listen" (dict "address" .Values.metrics.address "port" $port)) "service" (printf "%s-webhook" (include "weightd.name" .)) -}}
{{- if eq .Values.injection.webhook.certificate "cert-manager" }}{{- $_ := set $webhook "certificate_dir" "/etc/weightd-certificate" }}{{- end -}}
{{- $_ := set $config "controller" (merge $webhook (default dict $config.controller)) -}}
{{- end -}}
{{- range $key, $value := $config }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "weightd.tomlKey" $key }} = {{ include "weightd.tomlValue" $value }}
{{- end }}
{{- end }}
{{- range $section, $keys := $config }}
{{- if kindIs "map" $keys }}

[{{ include "weightd.tomlKey" $section }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ include "weightd.tomlKey" $key }} = {{ include "weightd.tomlValue" $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Helm's toToml writes the numbers of a values file as floats, `80.0`, which no integer takes. */}}
{{- define "weightd.tomlValue" -}}
{{- if kindIs "map" . -}}
{ {{- range $index, $key := keys . | sortAlpha }}{{ if $index }},{{ end }} {{ include "weightd.tomlKey" $key }} = {{ include "weightd.tomlValue" (index $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{ range $index, $item := . }}{{ if $index }}, {{ end }}{{ include "weightd.tomlValue" $item }}{{ end }}]
{{- else if kindIs "float64" . -}}
{{ if eq (floor .) . }}{{ printf "%.0f" . }}{{ else }}{{ . }}{{ end }}
{{- else -}}
{{- /* Strings of JSON are strings of TOML, and so are its numbers and booleans. */ -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{- define "weightd.tomlKey" -}}
{{ if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* Lets pods of a service account of this namespace use a Security Context Constraint: (dict "root" $ "component" "gc" "account" "weightd-shared" "scc" "privileged"). */}}
{{- define "weightd.scc" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .account }}-scc
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "weightd.labels" (dict "root" .root "component" .component) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: system:openshift:scc:{{ .scc }}
subjects:
  - kind: ServiceAccount
    name: {{ .account }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{/* Security of every container that is not privileged: (dict "user" 0 "capabilities" list). */}}
{{- define "weightd.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
{{- /* A user may have a large number, and numbers of a values file are floats: 1.00073e+09. */}}
runAsUser: {{ int64 .user }}
{{- if ne (int64 .user) 0 }}
runAsNonRoot: true
{{- end }}
capabilities:
  drop: [ALL]
  {{- with .capabilities }}
  add: {{ toJson . }}
  {{- end }}
seccompProfile:
  type: RuntimeDefault
{{- with .seLinuxOptions }}
seLinuxOptions: {{ toJson . }}
{{- end }}
{{- end }}

{{/* SELinux of a container that writes to the node's directories: (dict "root" $ "own" {…}). */}}
{{- define "weightd.selinux" -}}
{{- if .own -}}
{{ toJson .own }}
{{- else if .root.Values.selinux.enabled -}}
{{ toJson (dict "type" .root.Values.selinux.type "level" "s0") }}
{{- else -}}
{}
{{- end -}}
{{- end }}

{{- define "weightd.check" -}}
{{- if and (eq .Values.injection.mode "webhook") (not .Values.controller.enabled) }}
{{- fail "injection.mode webhook needs controller.enabled: true (or use injection.mode policy)" }}
{{- end }}
{{- if and .Values.shared.claim (not .Values.shared.enabled) }}
{{- fail "shared.claim is set, and shared.enabled is not" }}
{{- end }}
{{- if eq (int .Values.metrics.port) (int .Values.node.livenessProbe.port) }}
{{- fail "metrics.port and node.livenessProbe.port are ports of one pod: choose two" }}
{{- end }}
{{- if and (eq .Values.injection.mode "webhook") (eq (int .Values.metrics.port) (int .Values.injection.webhook.port)) }}
{{- fail "metrics.port and injection.webhook.port are ports of one pod: choose two" }}
{{- end }}
{{- end }}

{{/* The namespaces whose pods are looked at. */}}
{{- define "weightd.injected" -}}
matchExpressions:
  - key: kubernetes.io/metadata.name
    operator: NotIn
    values: {{ concat (list "kube-system" .Release.Namespace) .Values.injection.excludeNamespaces | uniq | toJson }}
{{- end }}

{{/* Labels that rules and dashboard use: which node, and which part of weightd. */}}
{{- define "weightd.relabelings" -}}
- sourceLabels: [__meta_kubernetes_pod_node_name]
  targetLabel: node
- sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_component]
  targetLabel: weightd
{{- end }}
