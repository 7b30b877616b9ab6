//! GBNF, the notation of `::=` rules that other servers accept, to the mask engine's own.
//!
//! Rules that do not lead back to themselves become terminals, so that a grammar without recursion
//! is one regular expression and means exactly what it says. Only what recurses becomes rules, whose
//! terminals the engine's lexer tells apart by the longest match.
//!
//! Not here: limits on size and nesting (`compile`).

use std::collections::HashMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

use super::text;

/// Whether a grammar is written in this notation.
pub(super) fn is_gbnf(source: &str) -> bool {
    source.contains("::=")
}

/// The same grammar in the engine's notation, or what is wrong with it.
pub(super) fn to_lark(source: &str) -> Result<String, String> {
    let rules = Parser::new(source).rules()?;
    let index: HashMap<&str, usize> =
        rules.iter().enumerate().map(|(i, (name, _))| (name.as_str(), i)).collect();
    if index.len() < rules.len() {
        return Err("a rule is defined twice".to_owned());
    }
    let Some(&root) = index.get("root") else { return Err("there is no rule `root`".to_owned()) };
    let mut references = Vec::with_capacity(rules.len());
    for (_, parts) in &rules {
        let names = parts.iter().filter_map(|part| match part {
            Part::Rule(name) => Some(name.as_str()),
            Part::Lark(_) => None,
        });
        let known = names.map(|name| {
            index.get(name).copied().ok_or_else(|| format!("the rule `{name}` is not defined"))
        });
        references.push(known.collect::<Result<Vec<usize>, _>>()?);
    }
    // From the leaves up: a rule is a terminal if all it names are.
    let mut is_terminal = vec![false; rules.len()];
    loop {
        let next = (0..rules.len())
            .find(|&i| !is_terminal[i] && references[i].iter().all(|&named| is_terminal[named]));
        let Some(next) = next else { break };
        is_terminal[next] = true;
    }
    let name = |i: usize| if is_terminal[i] { format!("T{i}") } else { format!("r{i}") };
    let mut lark = format!("start: {}\n", name(root));
    for (i, (_, parts)) in rules.iter().enumerate() {
        lark.push_str(&name(i));
        lark.push(':');
        for part in parts {
            lark.push(' ');
            match part {
                Part::Lark(text) => lark.push_str(text),
                Part::Rule(rule) => lark.push_str(&name(index[rule.as_str()])),
            }
        }
        lark.push('\n');
    }
    Ok(lark)
}

/// A piece of a rule's right side.
enum Part {
    /// What both notations write alike, translated.
    Lark(String),
    Rule(String),
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str) -> Self {
        Self { rest: source.chars().peekable() }
    }

    fn rules(mut self) -> Result<Vec<(String, Vec<Part>)>, String> {
        let mut rules: Vec<(String, Vec<Part>)> = Vec::new();
        loop {
            self.skip_blank();
            let Some(&next) = self.rest.peek() else { break };
            if is_name(next) {
                let name = self.name();
                self.skip_blank();
                if self.rest.peek() == Some(&':') {
                    for expected in "::=".chars() {
                        if self.rest.next() != Some(expected) {
                            return Err(format!("`::=` is expected after `{name}`"));
                        }
                    }
                    rules.push((name, Vec::new()));
                    continue;
                }
                self.push(&mut rules, Part::Rule(name))?;
            } else {
                let part = self.part(next)?;
                self.push(&mut rules, Part::Lark(part))?;
            }
        }
        // An empty right side is the empty text.
        for (_, parts) in &mut rules {
            if parts.is_empty() {
                parts.push(Part::Lark("\"\"".to_owned()));
            }
        }
        Ok(rules)
    }

    fn push(&self, rules: &mut [(String, Vec<Part>)], part: Part) -> Result<(), String> {
        let rule = rules.last_mut().ok_or("the grammar must begin with a rule")?;
        rule.1.push(part);
        Ok(())
    }

    fn skip_blank(&mut self) {
        while let Some(&next) = self.rest.peek() {
            if next == '#' {
                while self.rest.next_if(|&c| c != '\n').is_some() {}
            } else if next.is_whitespace() {
                self.rest.next();
            } else {
                return;
            }
        }
    }

    fn name(&mut self) -> String {
        std::iter::from_fn(|| self.rest.next_if(|&c| is_name(c))).collect()
    }

    fn part(&mut self, next: char) -> Result<String, String> {
        self.rest.next();
        match next {
            '"' => self.literal(),
            '[' => self.class(),
            '.' => Ok("/(?s:.)/".to_owned()),
            '(' | ')' | '|' | '*' | '+' | '?' => Ok(next.to_string()),
            '{' => {
                let inner: String =
                    std::iter::from_fn(|| self.rest.next_if(|&c| c != '}')).collect();
                self.rest.next();
                Ok(format!("{{{inner}}}"))
            }
            other => Err(format!("{other:?} is not expected")),
        }
    }

    fn literal(&mut self) -> Result<String, String> {
        let mut value = String::new();
        loop {
            match self.rest.next().ok_or("a text has no end")? {
                '"' => return Ok(text::literal(&value)),
                '\\' => value.push(self.escape()?),
                other => value.push(other),
            }
        }
    }

    fn escape(&mut self) -> Result<char, String> {
        let kind = self.rest.next().ok_or("an escape has no end")?;
        let n_digits = match kind {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            other => return Ok(other),
        };
        let digits: String = self.rest.by_ref().take(n_digits).collect();
        let code = u32::from_str_radix(&digits, 16).ok().and_then(char::from_u32);
        code.ok_or_else(|| format!("`\\{kind}{digits}` is no character"))
    }

    fn class(&mut self) -> Result<String, String> {
        let mut class = "/[".to_owned();
        if self.rest.next_if_eq(&'^').is_some() {
            class.push('^');
        }
        loop {
            let character = match self.rest.next().ok_or("a class has no end")? {
                ']' => {
                    class.push_str("]/");
                    return Ok(class);
                }
                '-' => {
                    class.push('-');
                    continue;
                }
                '\\' => self.escape()?,
                other => other,
            };
            // Every character by its number: no notation then takes it for something else.
            write!(class, "\\u{{{:x}}}", u32::from(character)).expect("a String takes writes");
        }
    }
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_without_recursion_are_terminals() {
        let lark =
            to_lark("root ::= greeting \" \" [a-z]+ # a name\ngreeting ::=\n  \"hi\" | \"yo\"");
        let expected = "start: T0\nT0: T1 \" \" /[\\u{61}-\\u{7a}]/ +\nT1: \"hi\" | \"yo\"\n";
        assert_eq!(lark.as_deref(), Ok(expected));
    }

    #[test]
    fn rules_that_lead_back_to_themselves_are_rules() {
        let lark = to_lark("root ::= \"(\" root? \")\" digit{1,3}\ndigit ::= [0-9/\\]]").unwrap();
        assert!(lark.starts_with("start: r0\nr0: \"(\" r0 ? \")\" T1 {1,3}\nT1: "), "{lark}");
        assert!(lark.ends_with("/[\\u{30}-\\u{39}\\u{2f}\\u{5d}]/\n"), "{lark}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (source, message) in [
            ("a ::= \"x\"", "no rule `root`"),
            ("root ::= x", "`x` is not defined"),
            ("root ::= \"x", "a text has no end"),
            ("root ::= [x", "a class has no end"),
            ("\"x\" root ::= \"y\"", "begin with a rule"),
            ("root ::= \"a\"\nroot ::= \"b\"", "defined twice"),
            ("root ::= %", "not expected"),
        ] {
            let error = to_lark(source).unwrap_err();
            assert!(error.contains(message), "{source}: {error}");
        }
    }
}
