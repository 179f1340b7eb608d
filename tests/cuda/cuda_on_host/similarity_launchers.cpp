// SPDX-License-Identifier: Apache-2.0
// The launchers of minibatch_similarity under C names, for ctypes.
#include "minibatch_similarity.h"

using genperf::DType;

extern "C" {

void minibatch_similarity(const genperf::MinibatchSimilarityParams* params, int type) {
  genperf::launch_minibatch_similarity(*params, DType(type), nullptr);
}

void minibatch_similarity_backward(const genperf::MinibatchSimilarityBackwardParams* params,
                                   int type) {
  genperf::launch_minibatch_similarity_backward(*params, DType(type), nullptr);
}

}  // extern "C"
