//! Decides what the next step runs: a pure state machine over token counts and block ids.
