#!/usr/bin/env bash
# Builds kiln's images with kiln, pushes them to the test cluster's registry and deploys them.
#   deploy/overlays/test/deploy.sh [STATE_DIRECTORY_OF_THE_CLUSTER]
# SKIP_IMAGES=1 takes the images that the registry has.
set -euo pipefail
cd "$(dirname "$0")/../../.."
dir=${1:-/var/lib/kiln-cluster}
export KUBECONFIG=$dir/kubeconfig
registry=$(sed -n 's/^ *"registry": "\(.*\)",*$/\1/p' "$dir/cluster.json")
secure=${registry%:*}:5443
[ -n "${SKIP_IMAGES:-}" ] || REGISTRY=$registry/kiln INSECURE=true deploy/images/build.sh
bin/kubectl create namespace kiln-system --dry-run=client -o yaml | bin/kubectl apply --server-side -f - >/dev/null
bin/kubectl -n kiln-system create configmap registry-ca --from-file="$dir/pki/ca.crt" --dry-run=client -o yaml | bin/kubectl apply --server-side -f - >/dev/null
bin/kubectl kustomize deploy/overlays/test | sed "s/secure-registry\.invalid/$secure/; s/registry\.invalid/$registry/" |
	bin/kubectl apply --server-side --force-conflicts -f - >/dev/null
bin/kubectl -n kiln-system rollout restart daemonset/kiln-agent deployment/kiln-controller >/dev/null
bin/kubectl -n kiln-system rollout status --timeout=120s deployment/kiln-controller
bin/kubectl -n kiln-system rollout status --timeout=120s daemonset/kiln-agent
echo "kiln runs in the cluster; images go to $secure"
