# SPDX-License-Identifier: Apache-2.0
from tests.training_fixtures import (  # noqa: F401
    feature_rows,
    features_config,
    make_trial,
    on_two_processes,
    rows,
    still_config,
    train,
)
