//! Stories on a clock that the test moves.

use weightd_proto::weightd::v1::Wait;
use weightd_proto::weightd::v1::progress::Phase;
use weightd_proto::weightd::v1::wait::Kind;

use super::post::{Post, Reason, event_name};
use super::*;

const UNIT: Duration = Duration::from_secs(5);
const GIB: u64 = 1 << 30;

fn pod(name: &str) -> PodName {
    PodName {
        namespace: "team-a".to_owned(),
        name: name.to_owned(),
        uid: format!("uid-of-{name}"),
    }
}

fn story(name: &str, now: Instant) -> Story {
    let mut story = Story::begin(pod(name), "model".to_owned(), now, UNIT);
    story.called();
    story.model("hf://org/model@main");
    story
}

fn fetching(done: u64) -> Progress {
    Progress {
        model: format!("hf://org/model@{}", "a".repeat(40)),
        phase: Phase::Fetching.into(),
        bytes: 65 * GIB,
        bytes_done: done * GIB,
        bytes_fetched: done * GIB,
        bytes_per_second: 1.1 * GIB as f64,
        eta_seconds: Some(48.2),
        ..Progress::default()
    }
}

fn acquired() -> Acquired {
    Acquired {
        model: "hf://org/model@main".to_owned(),
        complete: true,
        ..Acquired::default()
    }
}

fn one(story: Story) -> HashMap<String, Story> {
    HashMap::from([("csi/a".to_owned(), story)])
}

fn due(stories: &mut HashMap<String, Story>, now: Instant) -> Option<Post> {
    match story::next(stories, now, |_| None) {
        Turn::Now(_, post) => Some(post),
        Turn::At(_) | Turn::Never => None,
    }
}

#[test]
fn a_day_of_waiting_is_told_in_growing_pauses() {
    let begun = Instant::now();
    let mut stories = one(story("web", begun));
    let mut told = Vec::new();
    let mut now = begun;
    while now < begun + Duration::from_secs(1200) {
        let story = stories.get_mut("csi/a").expect("it goes on");
        story.progress(fetching(12), now);
        if let Some(post) = due(&mut stories, now) {
            told.push((now - begun).as_secs());
            let count = post.count + 1;
            let story = stories.get_mut("csi/a").expect("it goes on");
            story.posted(&post, count, now);
        }
        now += Duration::from_secs(1);
    }

    assert_eq!(told, [5, 35, 95, 215, 515, 815, 1115]);
}

#[test]
fn that_it_waits_for_something_else_is_told_sooner_but_not_at_once() {
    let begun = Instant::now();
    let at = |second| begun + Duration::from_secs(second);
    let mut stories = one(story("web", begun));
    let tell = |stories: &mut HashMap<String, Story>, second| {
        let post = due(stories, at(second)).expect("it is due");
        let count = post.count + 1;
        stories
            .get_mut("csi/a")
            .expect("it goes on")
            .posted(&post, count, at(second));
        post.note
    };
    tell(&mut stories, 5);
    let waits = |kind: Kind| Progress {
        wait: Some(Wait {
            kind: kind.into(),
            detail: "another node, which brings the same files into the shared tier".to_owned(),
            until: None,
        }),
        ..fetching(12)
    };

    stories
        .get_mut("csi/a")
        .expect("it goes on")
        .progress(waits(Kind::Neighbour), at(7));

    assert!(due(&mut stories, at(19)).is_none());
    assert_eq!(
        tell(&mut stories, 20),
        "fetching hf://org/model@main for volume `model`: 12.0 of 65.0 GiB, waiting for another node, which brings \
         the same files into the shared tier"
    );
    // The same again is no news.
    stories
        .get_mut("csi/a")
        .expect("it goes on")
        .progress(waits(Kind::Neighbour), at(22));
    assert!(due(&mut stories, at(60)).is_none());
}

#[test]
fn nothing_is_told_of_what_is_there_soon_and_the_end_of_all_else() {
    let begun = Instant::now();
    let at = |second| begun + Duration::from_secs(second);
    let mut quick = story("quick", begun);
    quick.mounted(&acquired(), at(4));
    assert!(quick.is_over());
    let mut stories = one(story("slow", begun));
    let slow = stories.get_mut("csi/a").expect("it is there");
    slow.progress(fetching(12), at(4));
    let post = due(&mut stories, at(5)).expect("it is due");
    assert_eq!(
        post.note,
        "fetching hf://org/model@main for volume `model`: 12.0 of 65.0 GiB, 1.1 GiB/s from the Hub, about 48 s left"
    );
    let slow = stories.get_mut("csi/a").expect("it is there");
    // It is mounted while that is being written.
    slow.posting(true);
    slow.progress(
        Progress {
            bytes_done: 65 * GIB,
            bytes_fetched: 40 * GIB,
            bytes_shared: 20 * GIB,
            ..fetching(12)
        },
        at(63),
    );
    slow.mounted(&acquired(), at(63));
    assert!(!slow.is_over());
    slow.posting(false);
    slow.posted(&post, 1, at(63));

    let post = due(&mut stories, at(63)).expect("it is due");

    assert_eq!(post.reason, Reason::Ready);
    assert_eq!(
        post.note,
        "volume `model` is mounted with hf://org/model@main: 65.0 GiB in 63 s, 40.0 GiB from the Hub, 20.0 GiB from \
         the shared tier, 5.0 GiB was on the node"
    );
    let slow = stories.get_mut("csi/a").expect("it is there");
    slow.posted(&post, 1, at(63));
    assert!(slow.is_over());
}

#[test]
fn between_two_calls_nothing_old_is_told() {
    let begun = Instant::now();
    let at = |second| begun + Duration::from_secs(second);
    let mut waits = story("web", begun);
    waits.progress(fetching(12), at(1));
    waits.left(at(2));
    let mut stories = one(waits);
    assert!(due(&mut stories, at(100)).is_none());
    let story = stories.get_mut("csi/a").expect("it goes on");
    assert!(!story.is_forgotten(at(100), FORGOTTEN));
    story.called();

    assert!(due(&mut stories, at(100)).is_some());

    let story = stories.get_mut("csi/a").expect("it goes on");
    story.left(at(100));
    assert!(story.is_forgotten(at(1000), FORGOTTEN));
}

#[test]
fn a_failure_that_nobody_asks_about_any_more_is_told_once() {
    let begun = Instant::now();
    let at = |second| begun + Duration::from_secs(second);
    let mut fails = story("web", begun);
    fails.failed("no such model\nhint: look", at(1));
    fails.left(at(1));
    let mut stories = one(fails);
    let post = due(&mut stories, at(1)).expect("at once");
    assert_eq!(post.note, "volume `model`: no such model; hint: look");
    assert_eq!(post.reason, Reason::Failed);
    let story = stories.get_mut("csi/a").expect("it goes on");
    story.posted(&post, 1, at(2));
    assert!(due(&mut stories, at(3600)).is_none());
    // Kubelet asks again, and hears the same.
    let story = stories.get_mut("csi/a").expect("it goes on");
    story.failed("no such model\nhint: look", at(10));
    assert!(due(&mut stories, at(31)).is_none());
    assert!(due(&mut stories, at(32)).is_some());
}

#[test]
fn a_hundred_pods_of_one_node_share_its_writes_and_ends_go_first() {
    let begun = Instant::now();
    let mut stories: HashMap<String, Story> = (0..100)
        .map(|n| (format!("csi/{n}"), story(&format!("web-{n}"), begun)))
        .collect();
    let mut budget = Budget::full(begun);
    let (mut writes, mut first, mut ready) = (Vec::new(), 0, 0);
    for second in 0..600 {
        let now = begun + Duration::from_secs(second);
        for story in stories.values_mut() {
            match second {
                60 => story.mounted(&acquired(), now),
                0..60 => story.progress(fetching(12), now),
                _ => {}
            }
        }
        stories.retain(|_, story| !story.is_over());
        while budget.next(now) <= now {
            let Turn::Now(holder, post) = story::next(&mut stories, now, |_| None) else {
                break;
            };
            budget.take();
            writes.push(second);
            match post.reason {
                Reason::Fetching => first += u32::from(post.count == 0),
                Reason::Ready => ready += 1,
                Reason::Failed => panic!("{post:?}"),
            }
            let story = stories.get_mut(&holder).expect("it goes on");
            story.posted(&post, post.count + 1, now);
        }
    }

    let within = |from, to| writes.iter().filter(|at| (from..to).contains(*at)).count();
    assert_eq!(within(0, 10), 29, "25 at once, then one a second");
    assert!(within(10, 60) <= 50, "{writes:?}");
    // Whoever was not told anything yet is told nothing any more.
    assert_eq!(ready, first);
    assert!(stories.is_empty(), "{} go on", stories.len());
    assert!(writes.len() <= 180, "{}", writes.len());
}

#[test]
fn a_namespace_that_refuses_us_holds_up_no_other() {
    let begun = Instant::now();
    let now = begun + UNIT;
    let mut stories = one(story("web", begun));
    let mut other = story("other", begun);
    other.progress(fetching(1), now);
    stories.insert("csi/b".to_owned(), other);
    let mut refused = pod("refused");
    refused.namespace = "team-b".to_owned();
    let mut story = Story::begin(refused, "model".to_owned(), begun, UNIT);
    story.failed("no such model", begun);
    stories.insert("csi/c".to_owned(), story);

    let quiet = |namespace: &str| (namespace == "team-b").then(|| now + DENIED);
    let turn = story::next(&mut stories, now, quiet);

    assert!(matches!(turn, Turn::Now(holder, _) if holder != "csi/c"));
    stories.retain(|holder, _| holder == "csi/c");
    let turn = story::next(&mut stories, now, quiet);
    assert!(matches!(turn, Turn::At(at) if at == now + DENIED));
}

#[test]
fn names_of_events_are_valid_and_stay() {
    let long = pod(&format!("{}.{}", "a".repeat(235), "b".repeat(17)));

    let name = event_name(&long, "model", Reason::Ready);

    assert!(name.len() <= 253, "{}", name.len());
    assert!(!name.contains(".."), "{name}");
    assert_eq!(name, event_name(&long, "model", Reason::Ready));
    assert_ne!(name, event_name(&long, "draft", Reason::Ready));
    assert_ne!(name, event_name(&long, "model", Reason::Failed));
    let web = event_name(&pod("web"), "model", Reason::Ready);
    assert!(web.starts_with("web."), "{web}");
}

#[tokio::test]
async fn too_many_volumes_are_not_told_of() {
    let events = Events::new(UNIT);
    let target = |n: usize| Target {
        path: format!("/pods/{n}").into(),
        holder: format!("csi/{n}"),
        pod_uid: n.to_string(),
        volume: "model".to_owned(),
    };
    let tellings: Vec<Telling> = (0..MOST)
        .map(|n| events.tell(&target(n), &pod("web")))
        .collect();
    assert!(tellings.iter().all(|telling| telling.0.is_some()));

    let more = events.tell(&target(MOST), &pod("web"));

    assert!(more.0.is_none());
    assert!(events.tell(&target(0), &pod("web")).0.is_some());
}
