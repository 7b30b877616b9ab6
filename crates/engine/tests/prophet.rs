//! A drafter that knows how requests go on, and errs where it is told to.

use fathom_core::TokenId;
use fathom_engine::{
    DraftMethod, DraftRequest, Drafter, EngineConfig, EngineHandle, GenerateRequest,
    SpeculationConfig, StepError, StepRunner,
};
use fathom_ops::sample::Beside;

/// Says whether the draft for a position of the request with this seed is wrong.
pub(crate) type Errs = Box<dyn Fn(u64, usize) -> bool + Send>;

/// Knows whole texts, prompt and answer, by the seed of their request.
pub(crate) struct Prophet {
    texts: Vec<(u64, Vec<TokenId>)>,
    errs: Errs,
    vocabulary: u32,
}

impl Prophet {
    pub(crate) fn new(
        requests: &[GenerateRequest],
        answers: &[Vec<TokenId>],
        vocabulary: u32,
        errs: impl Fn(u64, usize) -> bool + Send + 'static,
    ) -> Self {
        let text = |(request, answer): (&GenerateRequest, &Vec<TokenId>)| {
            (request.sampling.seed, [&request.prompt[..], answer].concat())
        };
        let texts = requests.iter().zip(answers).map(text).collect();
        Self { texts, errs: Box::new(errs), vocabulary }
    }
}

impl Drafter for Prophet {
    fn draft(
        &mut self,
        requests: &[DraftRequest<'_>],
        _: &mut dyn StepRunner,
        drafts: &mut [Vec<TokenId>],
        _: &mut Beside<'_>,
    ) -> Result<(), StepError> {
        for (request, draft) in requests.iter().zip(drafts) {
            let (seed, known) = (request.sampling.seed, request.tokens);
            let text = self.texts.iter().find(|(of, text)| *of == seed && text.starts_with(known));
            let future = text.map_or(&[][..], |(_, text)| &text[known.len()..]);
            let guesses = future.iter().copied().chain(std::iter::repeat(0));
            for (position, token) in (known.len()..).zip(guesses).take(request.n_drafts as usize) {
                let wrong = u32::from((self.errs)(seed, position));
                draft.push((token + wrong) % self.vocabulary);
            }
        }
        Ok(())
    }
}

/// Speculation that always runs `max_drafts` drafts.
pub(crate) fn always(method: DraftMethod, max_drafts: u32) -> SpeculationConfig {
    SpeculationConfig { method, max_drafts, is_adaptive: false }
}

/// An engine whose drafts are those of `prophet`.
pub(crate) fn start(
    runner: Box<dyn StepRunner>,
    prophet: Prophet,
    max_drafts: u32,
    config: EngineConfig,
) -> EngineHandle {
    let speculation = always(DraftMethod::Off, max_drafts);
    let config = EngineConfig { speculation, ..config };
    EngineHandle::start_with_drafter(runner, Box::new(prophet), config).unwrap()
}
