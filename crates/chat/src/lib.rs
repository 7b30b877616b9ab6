//! Between text and tokens, both ways: V4 prompt encoding, tokenizer, detokeniser and output parser.
