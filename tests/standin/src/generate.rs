//! Small models with all the files that a real one has, and shards that are broken on purpose.

mod broken;
mod shard;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value, json};

pub use broken::{
    header_of_length, index_naming_absent_shard, index_naming_absent_tensor, overlapping,
    truncated, with_hole,
};
use shard::Shard;

/// A model: configuration, tokenizer, `shards` safetensors files of about `bytes_per_shard` bytes
/// of tensors each, and the index of them if there is more than one.
///
/// The same arguments give the same bytes.
pub fn model(seed: u64, shards: usize, bytes_per_shard: usize) -> Vec<(String, Bytes)> {
    let plans = plan(shards, bytes_per_shard as u64);
    let mut files = small_files(&plans);
    for (number, shard) in plans.iter().enumerate() {
        let mut bytes = Vec::with_capacity(shard.size() as usize);
        let seed = shard_seed(seed, number);
        shard
            .write(seed, &mut bytes)
            .expect("a Vec takes any number of bytes");
        files.push((shard.name.clone(), bytes.into()));
    }
    files.sort();
    files
}

/// Writes what [`model`] returns under `root`, without holding a shard in memory. Returns the
/// paths, in order.
///
/// # Errors
///
/// If a file cannot be written.
pub fn write_model(
    root: &Path,
    seed: u64,
    shards: usize,
    bytes_per_shard: u64,
) -> io::Result<Vec<String>> {
    std::fs::create_dir_all(root)?;
    let plans = plan(shards, bytes_per_shard);
    let mut paths = Vec::new();
    for (path, bytes) in small_files(&plans) {
        std::fs::write(root.join(&path), bytes)?;
        paths.push(path);
    }
    for (number, shard) in plans.iter().enumerate() {
        let mut file = std::fs::File::create(root.join(&shard.name))?;
        shard.write(shard_seed(seed, number), &mut file)?;
        paths.push(shard.name.clone());
    }
    paths.sort();
    Ok(paths)
}

fn shard_seed(seed: u64, number: usize) -> u64 {
    seed.wrapping_mul(1_000_003).wrapping_add(number as u64)
}

fn plan(shards: usize, bytes_per_shard: u64) -> Vec<Shard> {
    let name = |number: usize| match shards {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{shards:05}.safetensors", number + 1),
    };
    (0..shards)
        .map(|number| Shard::plan(name(number), number, bytes_per_shard))
        .collect()
}

/// The index of several shards, as `transformers` writes it.
fn index(shards: &[Shard]) -> Value {
    let map: BTreeMap<&str, &str> = shards
        .iter()
        .flat_map(|shard| {
            let names = shard.tensors.iter().map(|tensor| tensor.name.as_str());
            names.map(|name| (name, shard.name.as_str()))
        })
        .collect();
    let total: u64 = shards.iter().map(Shard::tensor_bytes).sum();
    json!({"metadata": {"total_size": total}, "weight_map": map})
}

fn small_files(shards: &[Shard]) -> Vec<(String, Bytes)> {
    let vocabulary: BTreeMap<String, usize> = (0..512)
        .map(|token| (format!("token{token:03}"), token + 2))
        .chain([("<s>".to_owned(), 0), ("</s>".to_owned(), 1)])
        .collect();
    let mut files = vec![
        (
            "config.json",
            json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_hidden_layers": shards.len(),
                "torch_dtype": "bfloat16",
                "vocab_size": 514,
            }),
        ),
        (
            "generation_config.json",
            json!({"bos_token_id": 0, "eos_token_id": 1, "do_sample": false}),
        ),
        (
            "special_tokens_map.json",
            json!({"bos_token": "<s>", "eos_token": "</s>"}),
        ),
        (
            "tokenizer.json",
            json!({
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"},
            }),
        ),
        (
            "tokenizer_config.json",
            json!({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}),
        ),
    ];
    if shards.len() > 1 {
        files.push(("model.safetensors.index.json", index(shards)));
    }
    files
        .into_iter()
        .map(|(path, value)| (path.to_owned(), Bytes::from(format!("{value:#}\n"))))
        .collect()
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn every_shard_is_valid_and_the_index_agrees() {
        let files: BTreeMap<_, _> = model(7, 3, 300_000).into_iter().collect();
        let index: Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        let mut total = 0;
        let mut names = 0;
        for number in 1..=3 {
            let shard = format!("model-{number:05}-of-00003.safetensors");
            let tensors = SafeTensors::deserialize(&files[&shard]).unwrap();
            for (name, tensor) in tensors.tensors() {
                assert_eq!(map[&name], shard);
                total += tensor.data().len();
                names += 1;
            }
            assert!((250_000..400_000).contains(&files[&shard].len()), "{shard}");
        }
        assert_eq!(index["metadata"]["total_size"], total);
        assert_eq!(map.len(), names);
    }

    #[test]
    fn a_model_on_disk_is_the_one_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let paths = write_model(folder.path(), 7, 2, 100_000).unwrap();
        let expected = model(7, 2, 100_000);
        assert_eq!(paths.len(), expected.len());
        for (path, bytes) in expected {
            assert!(
                std::fs::read(folder.path().join(&path)).unwrap() == bytes,
                "{path}"
            );
        }
        assert_ne!(model(8, 2, 100_000), model(7, 2, 100_000));
    }

    #[test]
    fn broken_shards_are_refused() {
        let table = [
            ("header", header_of_length(1 << 63)),
            ("overlap", overlapping()),
            ("hole", with_hole()),
            ("truncated", truncated()),
        ];
        for (name, bytes) in table {
            assert!(SafeTensors::deserialize(&bytes).is_err(), "{name}");
        }
    }

    #[test]
    fn a_broken_index_differs_from_its_shards() {
        let find =
            |files: &[(String, Bytes)], name: &str| files.iter().any(|(path, _)| path == name);
        let files = index_naming_absent_shard(1);
        assert!(!find(&files, "model-00002-of-00002.safetensors"));
        let files = index_naming_absent_tensor(1);
        assert!(find(&files, "model-00002-of-00002.safetensors"));
        let index = files.iter().find(|(path, _)| path.ends_with("index.json"));
        assert!(String::from_utf8_lossy(&index.unwrap().1).contains("absent.weight"));
    }
}
