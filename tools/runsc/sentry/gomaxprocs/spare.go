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

package gomaxprocs

// This file is kiln's addition to the package.

// Spare is how many more goroutines than processors may run at once. A task whose program
// computes holds its share while it waits for the program, until Go's monitor takes that
// away; with one share for each processor, tasks that have work wait for the monitor,
// which then looks every 20 microseconds or so, as often as it can.
const Spare = 6
