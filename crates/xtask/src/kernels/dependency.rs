//! Whether machine code waits for the launch before it as the manifest says.
//!
//! The compiler takes what a `__restrict__` parameter points to for the same all through a kernel and
//! moves loads of it before the wait, where the emulator cannot see it: so the code itself is looked at.
//! Only up to the first wait in its text: of a kernel whose warps wait apart, the code of the others lies
//! behind it. What its source does too early is the emulator's to find.

use super::manifest::{Dependent, File};

/// The wait, as machine code has it.
const WAIT: &str = "ACQBULK";
/// What stores to global memory; and copies from it that kernels make of their inputs alone.
const NEVER: [&str; 5] = ["STG", "ATOMG", "REDG", "UTMASTG", "LDGSTS"];
/// What reads it, and what stores through an address of any kind.
const LATE: [&str; 6] = ["LDG", "LD.", "UBLKCP", "UTMALDG", "ST.", "ATOM."];

/// The first architecture that has the wait.
const FIRST: u32 = 90;

/// What `sass` falls short of, kernel by kernel.
pub(super) fn faults(file: &File, arch: &str, sass: &str) -> Vec<String> {
    let number = arch.trim_start_matches(|c: char| !c.is_ascii_digit());
    let number: String = number.chars().take_while(char::is_ascii_digit).collect();
    let dependent = file.dependent.filter(|_| number.parse().is_ok_and(|n: u32| n >= FIRST));
    // What comes before the first kernel is none.
    let kernels = sass.split("Function : ").skip(1);
    kernels
        .filter_map(|kernel| {
            let fault = fault(dependent, kernel)?;
            let name = kernel.split_whitespace().next().unwrap_or_default();
            Some(format!("{} {arch}: `{name}` {fault}", file.path))
        })
        .collect()
}

fn fault(dependent: Option<Dependent>, kernel: &str) -> Option<String> {
    let mut codes = kernel.lines().filter_map(code);
    let Some(dependent) = dependent else {
        return codes.any(|code| code == WAIT).then(|| "waits, and is not dependent".to_owned());
    };
    let mut early = None;
    for code in codes {
        if code == WAIT {
            return early.map(|code| format!("has {code} before it waits"));
        }
        let is = |list: &[&str]| list.iter().any(|start| code.starts_with(start));
        if is(&NEVER) || (dependent == Dependent::WaitsFirst && is(&LATE)) {
            early.get_or_insert(code);
        }
    }
    Some("does not wait for the launch before it".to_owned())
}

/// The instruction of a line: `/*00c0*/  @!P1 LDG.E R12, ...`.
fn code(line: &str) -> Option<&str> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    // Lines with the second half of an instruction have no address but all of its bits.
    if address.starts_with(' ') {
        return None;
    }
    let mut words = rest.split_whitespace();
    let first = words.next()?;
    let code = if first.starts_with('@') { words.next()? } else { first };
    Some(code.trim_end_matches(';'))
}

#[cfg(test)]
mod tests {
    use super::super::manifest::Manifest;
    use super::*;

    fn file(dependent: &str) -> File {
        let text = format!(
            "[defaults]\narchs = [\"sm_80\", \"sm_90a\"]\n[[file]]\npath = \"a.cu\"\n\
             entries = [\"a\", \"b\"]\n{dependent}\n"
        );
        Manifest::parse(&text).unwrap().files.remove(0)
    }

    fn sass(kernels: &[(&str, &[&str])]) -> String {
        let mut out = "code for sm_90a\n".to_owned();
        for (name, codes) in kernels {
            out += &format!("\t\tFunction : {name}\n");
            for (index, code) in codes.iter().enumerate() {
                out += &format!("        /*{:04x}*/    {code} R1, R2 ;  /* 0x00 */\n", 16 * index);
                out += "                                       /* 0x01 */\n";
            }
        }
        out
    }

    #[test]
    fn every_kernel_of_a_dependent_file_waits_before_it_loads_or_stores() {
        let first = file("dependent = \"waits first\"");
        let sound = sass(&[("a", &["MOV", "ACQBULK", "LDG.E"]), ("b", &["ACQBULK", "STG.E"])]);
        assert_eq!(faults(&first, "sm_90a", &sound), [""; 0]);
        let early = sass(&[("a", &["@!P0 LDG.E", "ACQBULK"]), ("b", &["MOV"])]);
        let found = faults(&first, "sm_90a", &early);
        assert_eq!(found.len(), 2);
        assert!(
            found[0].contains("`a` has LDG.E before") && found[1].contains("`b` does not wait")
        );
    }

    #[test]
    fn weights_first_may_load_early_and_never_store() {
        let weights = file("dependent = \"weights first\"");
        let loads = sass(&[("a", &["UTMALDG.2D", "LDG.E", "ACQBULK", "LDGSTS"])]);
        assert_eq!(faults(&weights, "sm_90a", &loads), [""; 0]);
        for early in ["STG.E", "LDGSTS.E"] {
            let stores = sass(&[("a", &[early, "ACQBULK"])]);
            assert_eq!(faults(&weights, "sm_90a", &stores).len(), 1, "{early}");
        }
    }

    #[test]
    fn others_and_architectures_without_it_do_not_wait() {
        let waits = sass(&[("a", &["ACQBULK"])]);
        assert_eq!(faults(&file(""), "sm_90a", &waits).len(), 1);
        let first = file("dependent = \"waits first\"");
        assert_eq!(faults(&first, "sm_80", &waits).len(), 1);
        assert_eq!(faults(&first, "sm_80", &sass(&[("a", &["LDG.E"])])), [""; 0]);
        assert_eq!(faults(&first, "sm_120", &waits), [""; 0]);
    }
}
