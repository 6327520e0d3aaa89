//! One safetensors file: 8 bytes of header length, a JSON header, the tensors.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

/// Bytes made at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// Columns of every matrix.
const COLUMNS: u64 = 64;

#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub(super) name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
}

impl Tensor {
    fn new(name: String, dtype: &'static str, shape: Vec<u64>) -> Self {
        let width = if dtype == "F32" { 4 } else { 2 };
        let bytes = shape.iter().product::<u64>() * width;
        Self {
            name,
            dtype,
            shape,
            bytes,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) tensors: Vec<Tensor>,
}

impl Shard {
    /// One layer whose matrices share out `bytes`, with a small F32 norm.
    pub(super) fn plan(name: String, layer: usize, bytes: u64) -> Self {
        let parts = [
            ("mlp.down_proj", 3),
            ("mlp.up_proj", 3),
            ("self_attn.o_proj", 1),
            ("self_attn.q_proj", 1),
        ];
        let mut tensors = vec![Tensor::new(
            format!("model.layers.{layer}.input_layernorm.weight"),
            "F32",
            vec![COLUMNS],
        )];
        for (part, eighths) in parts {
            let rows = (bytes / 8 * eighths / (2 * COLUMNS)).max(1);
            let name = format!("model.layers.{layer}.{part}.weight");
            tensors.push(Tensor::new(name, "BF16", vec![rows, COLUMNS]));
        }
        Self { name, tensors }
    }

    pub(super) fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    pub(super) fn size(&self) -> u64 {
        self.head().len() as u64 + self.tensor_bytes()
    }

    fn head(&self) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut start = 0;
        for tensor in &self.tensors {
            let end = start + tensor.bytes;
            header.insert(
                tensor.name.clone(),
                entry(tensor.dtype, &tensor.shape, start, end),
            );
            start = end;
        }
        head(&Value::Object(header))
    }

    /// Head and pseudo-random tensors.
    pub(super) fn write(&self, seed: u64, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.head())?;
        let mut left = self.tensor_bytes();
        let mut block = vec![0; left.min(BLOCK_BYTES as u64) as usize];
        let mut random = fastrand::Rng::with_seed(seed);
        while left > 0 {
            let step = left.min(block.len() as u64) as usize;
            random.fill(&mut block[..step]);
            to.write_all(&block[..step])?;
            left -= step as u64;
        }
        Ok(())
    }
}

pub(super) fn entry(dtype: &str, shape: &[u64], start: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

/// Length and header, padded with spaces to 8 bytes as the format advises.
pub(super) fn head(header: &Value) -> Vec<u8> {
    let mut json = header.to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.append(&mut json);
    head
}
