//! Dockerfiles: nobody can build them in CI, so what can be seen without building is checked here.
//!
//! Base images are pinned; copied files are in the build context; the last stage runs as somebody
//! else than root, says how to ask whether it is healthy, and what it starts; build steps that run a
//! task of ours name one that exists.

use super::Finding;

/// What is known of the checkout.
pub(super) struct Context<'a> {
    /// Whether a path is tracked, or a folder of tracked files.
    pub(super) exists: &'a dyn Fn(&str) -> bool,
    /// Text of `.dockerignore`.
    pub(super) ignored: &'a str,
    /// Whether `cargo xtask` has this task.
    pub(super) is_task: &'a dyn Fn(&str) -> bool,
}

/// Whether `path` is a Dockerfile.
pub(super) fn is_dockerfile(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name == "Dockerfile" || name.starts_with("Dockerfile.")
}

/// Instructions with the line they begin in; continued lines are joined, comments left out.
fn instructions(source: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut continues = false;
    for (index, line) in source.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (text, goes_on) =
            line.strip_suffix('\\').map_or((line, false), |rest| (rest.trim_end(), true));
        match found.last_mut() {
            Some((_, last)) if continues => {
                last.push(' ');
                last.push_str(text);
            }
            _ => found.push((index + 1, text.to_owned())),
        }
        continues = goes_on;
    }
    found
}

/// Adds what is wrong with the Dockerfile `path`.
pub(super) fn check(path: &str, source: &str, context: &Context<'_>, findings: &mut Vec<Finding>) {
    let mut stages: Vec<String> = Vec::new();
    let mut last_stage: Vec<(String, String)> = Vec::new();
    for (line, text) in instructions(source) {
        let (name, rest) = text.split_once(' ').unwrap_or((&text, ""));
        let words: Vec<&str> = rest.split_whitespace().collect();
        let mut find = |message: String| findings.push(Finding::line(path, line, message));
        match name {
            "FROM" => {
                last_stage.clear();
                let image = words.first().copied().unwrap_or_default();
                let is_pinned = image.rsplit_once(':').is_some_and(|(_, tag)| tag != "latest");
                if !is_pinned && !stages.iter().any(|stage| stage == image) {
                    find(format!("pin the base image `{image}` to a version"));
                }
                if let [_, "AS", stage] = words[..] {
                    stages.push(stage.to_owned());
                }
            }
            "COPY" | "ADD" => copies(&words, &stages, context, &mut find),
            "RUN" => {
                let task = rest.split_once("cargo xtask ").map(|(_, rest)| rest);
                let task = task.and_then(|rest| rest.split_whitespace().next());
                if let Some(task) = task.filter(|task| !(context.is_task)(task)) {
                    find(format!("`cargo xtask` has no task `{task}`"));
                }
            }
            _ => {}
        }
        last_stage.push((name.to_owned(), rest.to_owned()));
    }
    let has = |name: &str| last_stage.iter().rfind(|(other, _)| other == name);
    if has("USER").is_none_or(|(_, user)| user == "root" || user == "0") {
        findings.push(Finding::file(path, "the last stage must run as a USER that is not root"));
    }
    for name in ["HEALTHCHECK", "ENTRYPOINT"] {
        if has(name).is_none() {
            findings.push(Finding::file(path, format!("the last stage needs a {name}")));
        }
    }
}

/// Checks the sources of a COPY.
fn copies(words: &[&str], stages: &[String], context: &Context<'_>, find: &mut dyn FnMut(String)) {
    let from = words.iter().find_map(|word| word.strip_prefix("--from="));
    if let Some(stage) = from {
        if !stages.iter().any(|known| known == stage) {
            find(format!("there is no stage `{stage}` before this line"));
        }
        return;
    }
    let paths: Vec<&str> = words.iter().copied().filter(|word| !word.starts_with("--")).collect();
    let Some((_, sources)) = paths.split_last() else { return };
    for source in sources.iter().filter(|source| **source != ".") {
        let source = source.trim_start_matches("./").trim_end_matches('/');
        if !(context.exists)(source) {
            find(format!("`{source}` is not in the repository"));
        }
        let first = source.split('/').next().unwrap_or(source);
        if context.ignored.lines().any(|line| line.trim().trim_matches('/') == first) {
            find(format!("`{source}` is left out by .dockerignore"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(source: &str) -> Vec<String> {
        let context = Context {
            exists: &|path| path == "LICENSE" || path == "crates",
            ignored: "target\n.git\n",
            is_task: &|task| task == "kernels",
        };
        let mut findings = Vec::new();
        check("Dockerfile.cuda", source, &context, &mut findings);
        findings.into_iter().map(|finding| finding.message).collect()
    }

    const END: &str = "USER fathom\nHEALTHCHECK CMD x\nENTRYPOINT [\"x\"]\n";

    #[test]
    fn a_sound_file_gives_no_findings() {
        let text = "# comment\nFROM rust:1.95 AS build\nCOPY . .\nRUN cargo xtask kernels \\\n  --check\n\
                    FROM base:13.0\nCOPY --from=build /x /y\nCOPY LICENSE /z\n";
        assert_eq!(messages(&format!("{text}{END}")), [""; 0]);
    }

    #[test]
    fn loose_images_absent_files_and_unknown_stages_and_tasks_are_found() {
        let text = "FROM rust AS build\nFROM base:latest\nFROM build\nCOPY README /x\n\
                    COPY target/x /y\nCOPY --from=other /x /y\nRUN cargo xtask kernals\n";
        let found = messages(&format!("{text}{END}"));
        let expected = [
            "`rust`",
            "`base:latest`",
            "`README`",
            "`target/x`",
            "`target/x`",
            "`other`",
            "`kernals`",
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (message, expected) in found.iter().zip(expected) {
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn the_last_stage_says_who_runs_what_and_whether_it_is_well() {
        assert_eq!(messages("FROM a:1\nUSER fathom\nHEALTHCHECK CMD x\nFROM b:1\n").len(), 3);
        assert_eq!(messages("FROM a:1\nUSER root\nHEALTHCHECK CMD x\nENTRYPOINT x\n").len(), 1);
    }
}
