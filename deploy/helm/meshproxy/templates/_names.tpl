{{/* The name of everything: the release's, with the chart's where it isn't in it. 63 characters: RFC 1123, a label. */}}
{{- define "meshproxy.name" -}}
{{- if contains "meshproxy" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-meshproxy" (.Release.Name | trunc 40) | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "meshproxy.selector" -}}
app.kubernetes.io/name: meshproxy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "meshproxy.labels" -}}
{{ include "meshproxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "meshproxy.config" -}}
{{- if .Values.config -}}{{- .Values.config -}}{{- else -}}{{- .Files.Get "files/meshproxy.toml" -}}{{- end -}}
{{- end -}}
