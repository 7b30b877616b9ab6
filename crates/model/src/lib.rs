//! DeepSeek-V4's forward pass, written once over the operator traits, and its cache geometry.
