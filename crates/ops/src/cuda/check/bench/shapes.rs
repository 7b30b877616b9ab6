//! What is timed: every operator with its sizes, at the dimensions of Flash and of Pro.

use fathom_core::LayerKind;
use fathom_core::model_config::{INDEX_HEAD_DIM, WINDOW};

/// An operator with its sizes: what is timed here, and what a peer must be given to be compared. What
/// must be read and written once, and what is multiplied, is said at each; what is small against that is
/// left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// `x [rows, k]` bf16 times `W [n, k]` in FP8, quantised input. W, x, and bf16 results; 2 n k
    /// operations per row.
    Fp8Linear {
        /// Where in a layer.
        part: &'static str,
        /// Rows of W.
        n: usize,
        /// Columns of W.
        k: usize,
    },
    /// `x [rows, k]` bf16 times `W [n, k]` bf16. W, x, and f32 results; 2 n k operations per row.
    Bf16Linear {
        /// Where in the model.
        part: &'static str,
        /// Rows of W.
        n: usize,
        /// Columns of W.
        k: usize,
    },
    /// The bf16 products that a compressing layer makes of its input: keys and gates of its
    /// compressors and, at ratio 4, the weights of index heads. Matrices, x, and results (f32 but for
    /// the weights); 2 operations per value of the matrices and row.
    CompressorInputs {
        /// Hidden size.
        width: usize,
        /// Which layer.
        kind: LayerKind,
        /// Index heads at ratio 4.
        index_heads: usize,
    },
    /// The first half of attention's output projection: a group of heads times a matrix of its own,
    /// FP8 weights and bf16 activations. Weights, heads, and results; 2 operations per weight and row, at the
    /// rate of bf16.
    GroupedOutput {
        /// Groups.
        n_groups: usize,
        /// Results of a group.
        rank: usize,
        /// Channels of the heads of a group.
        group_width: usize,
    },
    /// From `qr`: norm, `wq_b`, a norm and a rotation per head, and with index heads the same for
    /// these. Weights, `qr`, and queries; 2 operations per weight and row.
    Queries {
        /// Width of `qr`.
        rank: usize,
        /// Query heads.
        n_heads: usize,
        /// Index heads; 0 at ratio 128.
        index_heads: usize,
    },
    /// Norm, rotation and quantisation of KV rows, and what compressors store. A row: KV in bf16 in and
    /// out, and its FP8 form (also into the window if it is a sequence's only one); for each compressor
    /// its two inputs, as much written to the state, as much read from it when a group closes, and the
    /// row's share of an entry. Nothing is multiplied.
    Store {
        /// Which layer.
        kind: LayerKind,
        /// Whether all rows are of one sequence.
        is_chunk: bool,
        /// Tokens of every sequence.
        context: usize,
    },
    /// Experts and weights of each row, and, of few rows, their grouping. Gate (bf16) and x; 2
    /// operations per value of the gate and row.
    Router {
        /// Hidden size.
        width: usize,
        /// Experts.
        n_experts: usize,
        /// Experts of a token.
        top_k: usize,
        /// Tokens of the table that gives their experts; 0: the best scores do.
        table_tokens: usize,
    },
    /// FP4 experts and the shared expert, without the router. Of the experts those that uniform
    /// routing reaches, the shared one, x, and results; 6 operations per channel, width and expert of a
    /// row.
    Experts {
        /// Hidden size.
        width: usize,
        /// Intermediate size.
        channels: usize,
        /// Experts there are.
        n_experts: usize,
        /// Experts of a token.
        top_k: usize,
    },
    /// The shared expert by itself: gate and up, SwiGLU, down, all FP8. Weights, x, and results; 2
    /// operations per weight and row.
    SharedExpert {
        /// Hidden size.
        width: usize,
        /// Intermediate size.
        channels: usize,
    },
    /// The end of one sublayer and the beginning of the next, over four copies. Copies in and out, the
    /// sublayer's output, the next one's input in two forms, and `fn` (f32); 2 operations per value
    /// of `fn` and row.
    Boundary {
        /// Hidden size.
        width: usize,
    },
    /// Sparse attention over FP8 rows: the window's, and chosen entries. Of one token per sequence a
    /// row for each key; of a chunk every row of the cache once. Queries in, results out; 4 operations
    /// per channel, head and key.
    Attention {
        /// Query heads.
        n_heads: usize,
        /// Chosen entries.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
        /// Whether all rows are of one sequence.
        is_chunk: bool,
    },
    /// Scores of a ratio-4 layer's FP4 index keys, one token per sequence. Keys, queries, and f32
    /// scores; 2 operations per channel, head and key.
    IndexScores {
        /// Index heads.
        n_heads: usize,
        /// Entries to choose.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
    },
    /// The best of the scores of each row. Scores, once; nothing is multiplied.
    IndexTopK {
        /// Entries to choose.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
    },
    /// Both: keys, queries, and entries; scores do not count.
    IndexSelect {
        /// Index heads.
        n_heads: usize,
        /// Entries to choose.
        top_k: usize,
        /// Tokens of every sequence.
        context: usize,
    },
    /// Four copies of each token's embedding. A row of the table, and four out; nothing is multiplied.
    Embed {
        /// Hidden size.
        width: usize,
        /// Tokens there are.
        vocab: usize,
    },
    /// The copies become one, which is normalised. Copies, result, and `fn` (f32); 2 operations per
    /// value of `fn` and row.
    HeadNorm {
        /// Hidden size.
        width: usize,
    },
    /// What an MTP block begins with: norms and products of the next token's embedding and of each
    /// copy. Both matrices (FP8), a row of the table, copies in and out; 10 operations per width and
    /// width of a row.
    MtpInput {
        /// Hidden size.
        width: usize,
        /// Tokens there are.
        vocab: usize,
    },
    /// A token of each row of logits. Logits (f32), once; nothing is multiplied.
    Choose {
        /// Tokens there are.
        vocab: usize,
        /// Whether it is drawn, of what top-k, top-p and min-p leave; else the likeliest.
        is_drawn: bool,
    },
}

/// An operator for a number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The operator.
    pub operator: Operator,
    /// Tokens.
    pub rows: usize,
}

fn chunk(is_chunk: bool) -> &'static str {
    if is_chunk { ", a chunk" } else { "" }
}

fn layer(kind: LayerKind) -> &'static str {
    match kind {
        LayerKind::Window => "window",
        LayerKind::Csa => "ratio 4",
        LayerKind::Hca => "ratio 128",
    }
}

/// Rows of the matrices of [`Operator::CompressorInputs`]; results of the last are bf16 if it is the fifth.
pub(super) fn compressor_rows(kind: LayerKind, index_heads: usize) -> Vec<usize> {
    use fathom_core::model_config::HEAD_DIM;
    let coff = kind.compressor_width();
    let mut rows = vec![coff * HEAD_DIM; 2];
    if kind.has_indexer() {
        rows.extend([coff * INDEX_HEAD_DIM, coff * INDEX_HEAD_DIM, index_heads]);
    }
    rows
}

impl Operator {
    /// Its name for programs.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Fp8Linear { .. } => "fp8_linear",
            Self::Bf16Linear { .. } => "bf16_linear",
            Self::CompressorInputs { .. } => "compressor_inputs",
            Self::GroupedOutput { .. } => "grouped_output",
            Self::Queries { .. } => "queries",
            Self::Store { is_chunk: false, .. } => "store",
            Self::Store { .. } => "store_chunk",
            Self::Router { .. } => "router",
            Self::Experts { .. } => "experts",
            Self::SharedExpert { .. } => "shared_expert",
            Self::Boundary { .. } => "boundary",
            Self::Attention { is_chunk: false, .. } => "attention",
            Self::Attention { .. } => "attention_chunk",
            Self::IndexScores { .. } => "index_scores",
            Self::IndexTopK { .. } => "index_top_k",
            Self::IndexSelect { .. } => "index_select",
            Self::Embed { .. } => "embed",
            Self::HeadNorm { .. } => "head_norm",
            Self::MtpInput { .. } => "mtp_input",
            Self::Choose { is_drawn: false, .. } => "choose_likeliest",
            Self::Choose { .. } => "choose_drawn",
        }
    }

    /// Its sizes, by name.
    #[must_use]
    pub fn sizes(&self) -> Vec<(&'static str, usize)> {
        match *self {
            Self::Fp8Linear { n, k, .. } | Self::Bf16Linear { n, k, .. } => {
                vec![("n", n), ("k", k)]
            }
            Self::CompressorInputs { width, kind, index_heads } => {
                vec![("width", width), ("ratio", kind.ratio()), ("index_heads", index_heads)]
            }
            Self::GroupedOutput { n_groups, rank, group_width } => {
                vec![("n_groups", n_groups), ("rank", rank), ("group_width", group_width)]
            }
            Self::Queries { rank, n_heads, index_heads } => {
                vec![("rank", rank), ("n_heads", n_heads), ("index_heads", index_heads)]
            }
            Self::Store { kind, context, .. } => {
                vec![("ratio", kind.ratio()), ("context", context)]
            }
            Self::Router { width, n_experts, top_k, table_tokens } => vec![
                ("width", width),
                ("n_experts", n_experts),
                ("top_k", top_k),
                ("table_tokens", table_tokens),
            ],
            Self::Experts { width, channels, n_experts, top_k } => vec![
                ("width", width),
                ("channels", channels),
                ("n_experts", n_experts),
                ("top_k", top_k),
            ],
            Self::SharedExpert { width, channels } => {
                vec![("width", width), ("channels", channels)]
            }
            Self::Boundary { width } | Self::HeadNorm { width } => vec![("width", width)],
            Self::IndexTopK { top_k, context } => vec![("top_k", top_k), ("context", context)],
            Self::Attention { n_heads, top_k, context, .. }
            | Self::IndexScores { n_heads, top_k, context }
            | Self::IndexSelect { n_heads, top_k, context } => {
                vec![("n_heads", n_heads), ("top_k", top_k), ("context", context)]
            }
            Self::Embed { width, vocab } | Self::MtpInput { width, vocab } => {
                vec![("width", width), ("vocab", vocab)]
            }
            Self::Choose { vocab, .. } => vec![("vocab", vocab)],
        }
    }

    /// Whether the products are those of FP8 values where the device has them, else of bf16.
    #[must_use]
    pub const fn is_fp8(&self) -> bool {
        matches!(
            self,
            Self::Fp8Linear { .. }
                | Self::Queries { .. }
                | Self::Experts { .. }
                | Self::SharedExpert { .. }
                | Self::MtpInput { .. }
        )
    }

    /// Everything but the rows, for people.
    fn name(&self) -> String {
        match *self {
            Self::Fp8Linear { part, n, k } => format!("FP8 {part} [{n}, {k}]"),
            Self::Bf16Linear { part, n, k } => format!("bf16, {part} [{n}, {k}]"),
            Self::CompressorInputs { width, kind, .. } => {
                format!("bf16 compressor inputs, {}, width {width},", layer(kind))
            }
            Self::GroupedOutput { n_groups, rank, group_width } => {
                format!("wo_a, {n_groups} of [{rank}, {group_width}],")
            }
            Self::Queries { rank, n_heads, index_heads: 0 } => {
                format!("queries, {n_heads} heads of {rank},")
            }
            Self::Queries { rank, n_heads, index_heads } => {
                format!("queries, {n_heads} and {index_heads} heads of {rank},")
            }
            Self::Store { kind, is_chunk, .. } => {
                format!("store, {}{}", layer(kind), chunk(is_chunk))
            }
            Self::Router { width, n_experts, table_tokens: 0, .. } => {
                format!("router, {n_experts} of width {width},")
            }
            Self::Router { width, n_experts, .. } => {
                format!("router by table, {n_experts} of width {width},")
            }
            Self::Experts { width, n_experts, .. } => {
                format!("experts, {n_experts} of width {width},")
            }
            Self::SharedExpert { width, channels } => {
                format!("shared expert [{channels}, {width}]")
            }
            Self::Boundary { width } => format!("boundary, width {width},"),
            Self::Attention { n_heads, top_k, is_chunk, .. } => {
                format!("attention, {n_heads} heads, {} keys{}", WINDOW + top_k, chunk(is_chunk))
            }
            Self::IndexScores { n_heads, context, .. } => {
                format!("scores, {n_heads} heads, {}", LayerKind::Csa.n_entries(context))
            }
            Self::IndexTopK { top_k, context } => {
                format!("top-k, {top_k} of {}", LayerKind::Csa.n_entries(context))
            }
            Self::IndexSelect { top_k, context, .. } => {
                format!("index, {top_k} of {}", LayerKind::Csa.n_entries(context))
            }
            Self::Embed { width, .. } => format!("embedding, width {width},"),
            Self::HeadNorm { width } => format!("head's copies, width {width},"),
            Self::MtpInput { width, .. } => format!("MTP input, width {width},"),
            Self::Choose { vocab, is_drawn: false } => format!("likeliest token of {vocab}"),
            Self::Choose { vocab, .. } => format!("drawn token, all filters, of {vocab}"),
        }
    }
}

impl Shape {
    /// As [`Measured::name`](super::Measured::name).
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} x {}", self.operator.name(), self.rows)
    }
}

/// What a model's operators are made of.
struct Model {
    width: usize,
    rank: usize,
    n_heads: usize,
    n_groups: usize,
    group_rank: usize,
    index_heads: usize,
    channels: usize,
    n_experts: usize,
    top_k: usize,
    /// Entries that attention chooses.
    chosen: usize,
    vocab: usize,
    /// Rows of the part of the head that is timed.
    head_rows: usize,
    /// Tokens of the sequences that attention and stores see.
    context: usize,
}

const FLASH: Model = Model {
    width: 4096,
    rank: 1024,
    n_heads: 64,
    n_groups: 8,
    group_rank: 1024,
    index_heads: 64,
    channels: 2048,
    n_experts: 256,
    top_k: 6,
    chosen: 512,
    vocab: 129_280,
    head_rows: 129_280 / 8,
    context: 16_384,
};
const PRO: Model = Model {
    width: 7168,
    rank: 1536,
    n_heads: 128,
    n_groups: 16,
    channels: 3072,
    n_experts: 384,
    chosen: 1024,
    ..FLASH
};
/// Small enough for the block emulator.
const SMALL: Model = Model {
    width: 256,
    rank: 128,
    n_heads: 2,
    n_groups: 1,
    group_rank: 128,
    index_heads: 8,
    channels: 128,
    n_experts: 8,
    top_k: 3,
    chosen: 16,
    vocab: 1024,
    head_rows: 64,
    context: 256,
};

/// Rows of decode, and of a chunk of a prompt.
const DECODE: &[usize] = &[1, 8, 32, 128];
const BOTH: &[usize] = &[1, 8, 32, 128, 4096];
const FEWER: &[usize] = &[1, 64, 4096];
const CHUNK: &[usize] = &[4096];

/// Everything that is timed, in this order.
#[must_use]
pub fn shapes() -> Vec<Shape> {
    let mut list = List(Vec::new());
    list.products(&FLASH, &[1, 8, 64, 1024, 2048, 4096, 8192], BOTH);
    list.of(head(&FLASH), &[1, 64, 1024]);
    list.of(Operator::Boundary { width: FLASH.width }, &[1, 8, 32, 64, 128, 1024, 4096]);
    list.of(experts(&FLASH), &[1, 2, 4, 8, 16, 32, 64, 128, 512, 4096]);
    list.moe(&FLASH, BOTH);
    list.attention(&FLASH, DECODE, CHUNK);
    list.stores(&FLASH, DECODE, CHUNK);
    for context in [32_768, 131_072, 1_048_576] {
        list.selection(&FLASH, context, if context == 32_768 { DECODE } else { &[1, 8] });
    }
    list.ends(&FLASH, BOTH, DECODE);
    list.choices(&FLASH, DECODE);

    list.products(&PRO, FEWER, FEWER);
    list.of(head(&PRO), &[1, 64]);
    list.of(Operator::Boundary { width: PRO.width }, BOTH);
    list.of(experts(&PRO), &[1, 8, 64, 128, 4096]);
    list.moe(&PRO, FEWER);
    list.attention(&PRO, DECODE, CHUNK);
    for context in [32_768, 1_048_576] {
        list.of(Operator::IndexTopK { top_k: PRO.chosen, context }, &[1, 8]);
    }
    list.ends(&PRO, FEWER, &[1, 64]);
    list.0
}

/// Every operator at sizes that the block emulator runs.
#[must_use]
pub fn small_shapes() -> Vec<Shape> {
    let mut list = List(Vec::new());
    list.products(&SMALL, &[1, 9], &[1, 9]);
    list.of(head(&SMALL), &[2]);
    list.of(Operator::Boundary { width: SMALL.width }, &[1, 3]);
    list.of(experts(&SMALL), &[1, 17]);
    list.moe(&SMALL, &[1, 17]);
    list.attention(&SMALL, &[2], &[3]);
    list.stores(&SMALL, &[2], &[5]);
    list.selection(&SMALL, SMALL.context, &[1, 2]);
    list.ends(&SMALL, &[2], &[2]);
    list.choices(&SMALL, &[1, 2]);
    list.0
}

/// Products large enough that only their rate counts, of FP8 and of bf16.
#[must_use]
pub fn large_products(size: usize) -> [Shape; 2] {
    let (part, n, k, rows) = ("a large product", size, size, size);
    [Operator::Fp8Linear { part, n, k }, Operator::Bf16Linear { part, n, k }]
        .map(|operator| Shape { operator, rows })
}

const fn head(model: &Model) -> Operator {
    Operator::Bf16Linear { part: "an eighth of the head", n: model.head_rows, k: model.width }
}

const fn experts(model: &Model) -> Operator {
    let &Model { width, channels, n_experts, top_k, .. } = model;
    Operator::Experts { width, channels, n_experts, top_k }
}

/// Shapes so far.
struct List(Vec<Shape>);

impl List {
    fn of(&mut self, operator: Operator, rows: &[usize]) {
        self.0.extend(rows.iter().map(|&rows| Shape { operator, rows }));
    }

    /// FP8 layers, and attention's other products.
    fn products(&mut self, model: &Model, rows: &[usize], others: &[usize]) {
        use fathom_core::model_config::HEAD_DIM;
        let &Model { width, rank, n_heads, n_groups, group_rank, index_heads, channels, .. } =
            model;
        for (part, n, k) in [
            ("wq_a and wkv", rank + HEAD_DIM, width),
            ("wq_b", n_heads * HEAD_DIM, rank),
            ("wo_b", width, n_groups * group_rank),
            ("shared expert, up", channels, width),
        ] {
            self.of(Operator::Fp8Linear { part, n, k }, rows);
        }
        for kind in [LayerKind::Csa, LayerKind::Hca] {
            self.of(Operator::CompressorInputs { width, kind, index_heads }, others);
        }
        let group_width = n_heads * HEAD_DIM / n_groups;
        self.of(Operator::GroupedOutput { n_groups, rank: group_rank, group_width }, others);
        for index_heads in [0, index_heads] {
            self.of(Operator::Queries { rank, n_heads, index_heads }, others);
        }
    }

    /// What the mixture has beside its experts.
    fn moe(&mut self, model: &Model, rows: &[usize]) {
        let &Model { width, channels, n_experts, top_k, vocab, .. } = model;
        for table_tokens in [0, vocab] {
            self.of(Operator::Router { width, n_experts, top_k, table_tokens }, rows);
        }
        self.of(Operator::SharedExpert { width, channels }, rows);
    }

    fn attention(&mut self, model: &Model, decode: &[usize], chunks: &[usize]) {
        let &Model { n_heads, chosen: top_k, context, .. } = model;
        for (is_chunk, rows) in [(false, decode), (true, chunks)] {
            self.of(Operator::Attention { n_heads, top_k, context, is_chunk }, rows);
        }
    }

    fn stores(&mut self, model: &Model, decode: &[usize], chunks: &[usize]) {
        for kind in [LayerKind::Window, LayerKind::Csa, LayerKind::Hca] {
            // What is stored does not depend on how much there is.
            for (is_chunk, context, rows) in
                [(false, model.context.min(1024), decode), (true, model.context, chunks)]
            {
                self.of(Operator::Store { kind, is_chunk, context }, rows);
            }
        }
    }

    fn selection(&mut self, model: &Model, context: usize, rows: &[usize]) {
        let &Model { index_heads: n_heads, chosen: top_k, .. } = model;
        self.of(Operator::IndexScores { n_heads, top_k, context }, rows);
        self.of(Operator::IndexTopK { top_k, context }, rows);
        self.of(Operator::IndexSelect { n_heads, top_k, context }, rows);
    }

    /// Both ends of the model.
    fn ends(&mut self, model: &Model, all: &[usize], answers: &[usize]) {
        let &Model { width, vocab, .. } = model;
        self.of(Operator::Embed { width, vocab }, all);
        self.of(Operator::HeadNorm { width }, answers);
        self.of(Operator::MtpInput { width, vocab }, answers);
    }

    fn choices(&mut self, model: &Model, rows: &[usize]) {
        for is_drawn in [false, true] {
            self.of(Operator::Choose { vocab: model.vocab, is_drawn }, rows);
        }
    }
}
