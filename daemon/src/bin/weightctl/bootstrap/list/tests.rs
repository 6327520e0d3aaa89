use super::*;

fn models(list: &List) -> Vec<String> {
    assert!(list.problems.is_empty(), "{list:?}");
    let models = list.requests.iter();
    models.map(|request| request.model.to_string()).collect()
}

#[test]
fn a_text_names_models_between_spaces_commas_and_comments() {
    let list = parse(
        "# for the GPU nodes\n hf://org/a@main, s3://bucket/b\r\n\nhf://org/c # last\nhf://org/c\n#hf://org/d\n",
        "list",
    );
    assert_eq!(
        models(&list),
        ["hf://org/a@main", "s3://bucket/b", "hf://org/c"]
    );
    assert!(models(&parse("", "list")).is_empty());
}

#[test]
fn a_bad_line_is_told_and_the_others_hold() {
    let list = parse("hf://org/a\norg/b\nhf://org/c", "list");
    assert_eq!(list.requests.len(), 2);
    let [problem] = list.problems.as_slice() else {
        panic!("{list:?}")
    };
    assert!(problem.starts_with("list, line 2: "), "{problem}");
    assert!(problem.contains("org/b"), "{problem}");
}

#[test]
fn toml_has_the_keys_of_the_daemon() {
    let list = parse(
        "# models\n[[prefetch]]\nmodel = 'hf://org/a'\ninclude = ['*.gguf']\nexclude = ['old/*']\npin = 'boot'\n\
         [[prefetch]]\nmodel = 's3://bucket/b'\nwarm = true\n",
        "list",
    );
    assert_eq!(models(&list), ["hf://org/a", "s3://bucket/b"]);
    let pin = list.requests[0].pin.as_ref().map(ToString::to_string);
    assert_eq!(pin.as_deref(), Some("operator/boot"));
    let patterns = serde_json::to_value(&list.requests[0].patterns).unwrap();
    assert_eq!(patterns["include"][0], "*.gguf");
    assert_eq!(patterns["exclude"][0], "old/*");
}

#[test]
fn a_bad_table_is_told_and_the_others_hold() {
    let list = parse(
        "[[prefetch]]\nmodel = 'org/a'\n[[prefetch]]\nmodel = 'hf://org/b'\nmodell = 1\n[[prefetch]]\nmodel = 'hf://org/c'\n",
        "list",
    );
    assert_eq!(list.requests.len(), 1, "{list:?}");
    assert!(
        list.problems[0].starts_with("list, [[prefetch]] number 1"),
        "{list:?}"
    );
    assert!(list.problems[1].contains("modell"), "{list:?}");

    for text in [
        "[[prefetch]]\nmodel = \n",
        "root = '/x'\n[[prefetch]]\nmodel = 'hf://org/c'",
    ] {
        let list = parse(text, "list");
        assert!(list.requests.is_empty(), "{list:?}");
        assert_eq!(list.problems.len(), 1, "{list:?}");
    }
}

/// As Karpenter writes it: its boundary, its part at the end, only the type of each part kept.
const KARPENTER: &str = r#"MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="//"

--//
Content-Type: text/x-shellscript; charset="us-ascii"

#!/bin/sh
# BEGIN weightd prefetch
# hf://org/from-the-script
# END weightd prefetch
--//
Content-Type: text/x-weightd-prefetch

# hf://org/not-this
hf://org/a
--//
Content-Type: text/x-weightd-prefetch; charset="us-ascii"

[[prefetch]]
model = "hf://org/b"
--//
Content-Type: application/node.eks.aws

# Karpenter Generated NodeConfig
apiVersion: node.eks.aws/v1alpha1
kind: NodeConfig
--//--
"#;

#[test]
fn parts_of_mime_user_data_are_lists() {
    let all = models(&in_user_data(KARPENTER));
    assert_eq!(all, ["hf://org/a", "hf://org/b"]);
    let crlf = models(&in_user_data(&KARPENTER.replace('\n', "\r\n")));
    assert_eq!(crlf, all);
    let later = format!("\n{}", KARPENTER.replace("MIME-Version: 1.0\n", ""));
    assert_eq!(models(&in_user_data(&later)), all);
}

#[test]
fn a_part_may_be_encoded() {
    let text = "Content-Type: multipart/mixed; boundary=b\n\n--b\nContent-Type: text/x-weightd-prefetch\n\
                Content-Transfer-Encoding: base64\n\naGY6Ly9vcmcvYQo=\n--b--\n";
    assert_eq!(models(&in_user_data(text)), ["hf://org/a"]);
}

#[test]
fn a_section_of_other_user_data_is_a_list() {
    for text in [
        KARPENTER.replace("x-weightd-prefetch", "x-other"),
        "#!/bin/sh\n: <<END\n# BEGIN weightd prefetch\nhf://org/from-the-script\n# END weightd prefetch\nhf://org/x\nEND\n"
            .to_owned(),
    ] {
        assert_eq!(models(&in_user_data(&text)), ["hf://org/from-the-script"]);
    }
    assert!(models(&in_user_data("#!/bin/sh\necho hf://org/a\n")).is_empty());
    assert!(models(&in_user_data("#cloud-config\nx: 1\n")).is_empty());
}
