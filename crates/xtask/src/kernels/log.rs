//! What `ptxas -v` says about each kernel.

/// Resources of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct KernelReport {
    pub(crate) name: String,
    pub(crate) registers: u32,
    /// Spill stores and loads together.
    pub(crate) spilled_bytes: u32,
    pub(crate) stack_bytes: u32,
    /// Shared memory of fixed size; a launch may add to it.
    pub(crate) shared_bytes: u32,
}

impl std::fmt::Display for KernelReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, registers, spilled_bytes, stack_bytes, shared_bytes } = self;
        write!(f, "{name:<20} {registers:>4} registers, {shared_bytes:>6} bytes shared")?;
        if *stack_bytes > 0 {
            write!(f, ", {stack_bytes} bytes of stack")?;
        }
        if *spilled_bytes > 0 {
            write!(f, ", {spilled_bytes} bytes spilled")?;
        }
        Ok(())
    }
}

/// The kernels of a log, in its order.
pub(crate) fn reports(log: &str) -> Vec<KernelReport> {
    let mut reports: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            reports.push(KernelReport { name, ..KernelReport::default() });
        }
        let Some(report) = reports.last_mut() else { continue };
        if let Some(stack) = number_before(line, " bytes stack frame") {
            report.stack_bytes = stack;
            report.spilled_bytes = number_before(line, " bytes spill stores").unwrap_or(0)
                + number_before(line, " bytes spill loads").unwrap_or(0);
        }
        if let Some(registers) = number_before(line, " registers") {
            report.registers = registers;
            report.shared_bytes = number_before(line, " bytes smem").unwrap_or(0);
        }
    }
    reports
}

/// The number that ends where `what` begins.
fn number_before(line: &str, what: &str) -> Option<u32> {
    let (before, _) = line.split_once(what)?;
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_memory_and_spills_of_each_kernel_are_read() {
        let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
ptxas         .     16 bytes stack frame, 36 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 4112 bytes smem, 404 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers";
        let one = KernelReport {
            name: "one".to_owned(),
            registers: 80,
            spilled_bytes: 60,
            stack_bytes: 16,
            shared_bytes: 4112,
        };
        let two = KernelReport { name: "two".to_owned(), registers: 12, ..KernelReport::default() };
        assert_eq!(reports(log), [one, two]);
    }
}
