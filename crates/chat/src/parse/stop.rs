//! Stop strings: the answer ends before the first of them.
//!
//! A stop string may span any number of tokens. Text that could still become one is held back and
//! released when the match fails; whatever the cuts, the text handed out is the same.
//!
//! If several stop strings overlap, the one that is complete first wins, and of those complete at
//! the same byte the longest.

/// Watches a text for stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// The end of the text, as long as the longest match under way.
    held: String,
    matched: Option<usize>,
}

/// A stop string with its failure table, and how much of it the text ends with.
#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// `[text.len()]`: length of the longest proper border of each prefix.
    border: Vec<usize>,
    n_matched: usize,
}

impl StopMatcher {
    /// Watches for these strings. Empty ones are ignored: they would end every text.
    pub fn new<S: Into<String>>(stop: impl IntoIterator<Item = S>) -> Self {
        let patterns = stop
            .into_iter()
            .map(Into::into)
            .filter(|text| !text.is_empty())
            .map(Pattern::new)
            .collect();
        Self { patterns, held: String::new(), matched: None }
    }

    /// Takes more text and returns what is certain to stay. Once a stop string was found,
    /// everything is swallowed.
    pub fn push(&mut self, text: &str) -> String {
        if self.matched.is_some() {
            return String::new();
        }
        if self.patterns.is_empty() {
            return text.to_owned();
        }
        let mut all = std::mem::take(&mut self.held);
        let n_seen = all.len();
        all.push_str(text);
        for at in n_seen..all.len() {
            let byte = all.as_bytes()[at];
            for pattern in &mut self.patterns {
                pattern.step(byte);
            }
            let complete = self.patterns.iter().enumerate().filter(|(_, p)| p.is_complete());
            if let Some((index, pattern)) = complete.max_by_key(|(_, p)| p.text.len()) {
                self.matched = Some(index);
                all.truncate(at + 1 - pattern.text.len());
                return all;
            }
        }
        let longest = self.patterns.iter().map(|pattern| pattern.n_matched).max().unwrap_or(0);
        // A match begins with a whole character, so this is a boundary.
        self.held = all.split_off(all.len() - longest);
        all
    }

    /// Ends the text: what was held back stays after all.
    pub fn finish(&mut self) -> String {
        for pattern in &mut self.patterns {
            pattern.n_matched = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// The stop string that was found.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.patterns[index].text.as_str())
    }
}

impl Pattern {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut border = vec![0; bytes.len()];
        let mut n = 0;
        for i in 1..bytes.len() {
            while n > 0 && bytes[i] != bytes[n] {
                n = border[n - 1];
            }
            if bytes[i] == bytes[n] {
                n += 1;
            }
            border[i] = n;
        }
        Self { text, border, n_matched: 0 }
    }

    fn step(&mut self, byte: u8) {
        let bytes = self.text.as_bytes();
        while self.n_matched > 0 && bytes[self.n_matched] != byte {
            self.n_matched = self.border[self.n_matched - 1];
        }
        if bytes[self.n_matched] == byte {
            self.n_matched += 1;
        }
    }

    /// The text is left at the first complete match, so there is no step after this.
    fn is_complete(&self) -> bool {
        self.n_matched == self.text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stop: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stop.iter().copied());
        let mut text: String = pieces.iter().map(|piece| matcher.push(piece)).collect();
        text += &matcher.finish();
        (text, matcher.matched().map(str::to_owned))
    }

    #[test]
    fn the_stop_string_and_everything_after_it_are_removed() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), Some("END".into())));
    }

    #[test]
    fn text_that_might_become_a_stop_string_is_held_and_released() {
        let mut matcher = StopMatcher::new(["aab"]);
        assert_eq!(matcher.push("xaa"), "x");
        assert_eq!(matcher.push("a"), "a");
        assert_eq!(matcher.push("c"), "aac");
        assert_eq!(matcher.push("a"), "");
        assert_eq!(matcher.finish(), "a");
        assert_eq!(matcher.matched(), None);
    }

    #[test]
    fn the_first_to_be_complete_wins_and_then_the_longest() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".into(), Some("bc".into())));
        assert_eq!(run(&["c", "abc"], &["xabc"]), ("x".into(), Some("abc".into())));
    }

    #[test]
    fn characters_are_never_cut() {
        assert_eq!(run(&["é!"], &["né", "n"]), ("nén".into(), None));
        assert_eq!(run(&["中"], &["一中"]), ("一".into(), Some("中".into())));
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            stop in prop::collection::vec("[ab中]{1,4}", 0..3),
            pieces in prop::collection::vec("[abc中]{0,4}", 0..10),
        ) {
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, matched) = run(&stop, &pieces);
            prop_assert_eq!((text.clone(), matched.clone()), run(&stop, &[&whole]));
            // The naive definition: the first end of any occurrence, there the longest.
            let first = (1..=whole.len()).filter(|&end| whole.is_char_boundary(end)).find_map(|end| {
                stop.iter()
                    .filter(|stop| whole[..end].ends_with(**stop))
                    .max_by_key(|stop| stop.len())
                    .map(|stop| (whole[..end - stop.len()].to_owned(), Some((*stop).to_owned())))
            });
            prop_assert_eq!((text, matched), first.unwrap_or((whole, None)));
        }
    }
}
