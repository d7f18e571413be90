// Copyright The kiln Authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

package config

// This file is kiln's addition to the package.

import (
	"maps"
	"slices"

	"gvisor.dev/gvisor/pkg/seccomp"
	pre "gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
)

// Compile returns the filter that a sandbox with these options installs.
func Compile(opt Options) (pre.Program, error) {
	build := func(vars pre.Values) *seccomp.Program {
		allow, deny := rules(opt, vars)
		return &seccomp.Program{
			RuleSets: []seccomp.RuleSet{{Rules: deny.Copy()}, {Rules: allow.Copy(), Action: seccomp.Allow}},
			Options:  SeccompOptions(opt),
		}
	}
	return pre.Precompile(opt.ConfigKey(), slices.Collect(maps.Keys(opt.Vars())), build)
}
