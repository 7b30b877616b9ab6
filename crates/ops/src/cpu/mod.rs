//! The CPU backend: the definition of every operator's result.
