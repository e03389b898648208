"use strict";
// The monitor's page. It asks for one stream of events, which has all that it shows, and
// asks again when another order, filter, page or client is wanted.

const SAMPLES = 900;
const SILENCE_MS = 5000;
// The tables, by view. A column is its name in a row, its title, how its value is shown,
// and "spare" if a phone does without it.
const VIEWS = {
  clients: {
    noun: "clients", hint: "name or state, such as slow, held, offline", sort: "name", opens: "client",
    columns: [
      ["name", "client", plain],
      ["state", "state", plain],
      ["connections", "connections", count, "spare"],
      ["in", "in/s", count],
      ["out", "out/s", count],
      ["bytes_in", "bytes in/s", bytes, "spare"],
      ["bytes_out", "bytes out/s", bytes, "spare"],
      ["waiting", "waiting", bytes],
      ["fill", "queue", percent],
      ["stored", "mailbox", count],
      ["dead", "dead", count, "spare"],
      ["errors", "errors", count, "spare"],
    ],
  },
  topics: {
    noun: "topics with subscriptions", hint: "part of a topic", sort: "subscriptions", reverse: true,
    columns: [["pattern", "pattern", plain], ["subscriptions", "subscriptions", count]],
  },
  channels: {
    noun: "channels", hint: "caller, recipient or state", sort: "caller", opens: "client",
    columns: [
      ["caller", "caller", plain],
      ["recipient", "recipient", plain],
      ["state", "state", plain],
      ["since", "since", clock, "spare"],
      ["to_recipient", "to recipient/s", bytes],
      ["to_caller", "to caller/s", bytes],
      ["bytes_to_recipient", "to recipient", bytes, "spare"],
      ["bytes_to_caller", "to caller", bytes, "spare"],
      ["waiting_bytes", "waiting", bytes],
    ],
  },
  mailboxes: {
    noun: "mailboxes", hint: "name or state, such as full, orphaned", sort: "dead", reverse: true,
    opens: "mailbox",
    columns: [
      ["name", "mailbox", plain],
      ["state", "state", plain],
      ["ready", "ready", count],
      ["held", "held", count],
      ["delayed", "delayed", count, "spare"],
      ["dead", "dead", count],
      ["bytes", "bytes", bytes, "spare"],
      ["fill", "full", percent],
      ["oldest", "oldest", age],
      ["consumers", "consumers", count, "spare"],
    ],
  },
};
VIEWS.hosts = {
  noun: "other hosts", hint: "name, state or error", sort: "host",
  columns: [
    ["host", "host", plain],
    ["state", "state", plain],
    ["since", "since", clock, "spare"],
    ["names", "names", count],
    ["round_trip_ms", "round trip ms", plain],
    ["in_flight", "in flight", bytes],
    ["in_doubt", "in doubt", count],
    ["refused", "refused", count, "spare"],
    ["version", "version", plain, "spare"],
    ["digest", "digest of clients", plain, "spare"],
    ["last_error", "last error", plain],
  ],
};
const TABS = [...Object.keys(VIEWS), "broker"];
const CHARTS = [
  ["Messages in, out /s", ["in", "out"], count],
  ["Bytes in, out /s", ["bytes_in", "bytes_out"], bytes],
  ["Connections", ["connections"], count],
  ["Refused, dropped /s", ["refusals", "dropped"], count],
  ["Waiting for clients", ["waiting"], bytes],
  ["Slow, held", ["slow", "held"], count],
  ["Event loop late", ["lag"], seconds],
  ["Memory", ["memory"], bytes],
];

const $ = (id) => document.getElementById(id);
const state = { tab: "clients", opened: {} };
// What each table shows: its order, its filter and its first row.
const views = Object.fromEntries(Object.entries(VIEWS).map(([name, view]) => [
  name, { sort: view.sort, reverse: Boolean(view.reverse), filter: "", from: 0 },
]));
let samples = [];
let stream = null;
let lastEvent = 0;
let typing = 0;

function count(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(1) + " M";
  if (value >= 1e4) return (value / 1e3).toFixed(1) + " k";
  return String(Math.round(value * 10) / 10);
}

function bytes(value) {
  let unit = 0;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return (unit ? value.toFixed(1) : Math.round(value)) + " " + units[unit];
}

function seconds(value) {
  return value < 1 ? (value * 1000).toFixed(1) + " ms" : value.toFixed(2) + " s";
}

function percent(value) {
  return Math.round(value * 100) + " %";
}

function age(value) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (value >= size) return Math.floor(value / size) + " " + unit;
  }
  return Math.floor(value) + " s";
}

function plain(value) {
  return value;
}

function clock(at) {
  const date = new Date(at * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString() : date.toLocaleString();
}

function make(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

// The charts

function makeCharts() {
  for (const [title, names] of CHARTS) {
    const figure = make("figure");
    const caption = make("figcaption", title);
    caption.append(make("output"));
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    canvas.dataset.names = names.join();
    figure.append(caption, canvas);
    $("charts").append(figure);
  }
}

function valueOf(sample, name) {
  if (name !== "refusals") return sample[name];
  return Object.values(sample.refused).reduce((sum, each) => sum + each, 0);
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  const colours = [style.getPropertyValue("--line"), style.getPropertyValue("--second")];
  const now = samples.length ? samples[samples.length - 1].at : 0;
  document.querySelectorAll("#charts figure").forEach((figure, index) => {
    const [title, names, shown] = CHARTS[index];
    const canvas = figure.querySelector("canvas");
    const scale = window.devicePixelRatio || 1;
    const width = canvas.clientWidth * scale, height = canvas.clientHeight * scale;
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    const last = samples[samples.length - 1];
    let text = last ? names.map((name) => shown(valueOf(last, name))).join(", ") : "";
    if (last && names[0] === "refusals") {
      const codes = Object.entries(last.refused).map(([code, times]) => `${code} ${times}`);
      if (codes.length) text += ` (${codes.join(", ")})`;
    }
    figure.querySelector("output").textContent = text;
    canvas.setAttribute("aria-label", `${title}: ${text}`);
    const most = Math.max(1e-9, ...samples.flatMap((each) => names.map((name) => valueOf(each, name))));
    names.forEach((name, which) => {
      pen.strokeStyle = colours[which];
      pen.lineWidth = 1.5 * scale;
      pen.beginPath();
      let then = null;
      for (const sample of samples) {
        const x = width * (1 - (now - sample.at) / SAMPLES);
        const y = height - 2 * scale - (height - 4 * scale) * valueOf(sample, name) / most;
        // A gap in time is a gap in the line.
        if (then === null || sample.at - then > 3) pen.moveTo(x, y); else pen.lineTo(x, y);
        then = sample.at;
      }
      pen.stroke();
    });
  });
}

// The table

function makeColumns() {
  const columns = VIEWS[state.tab].columns.map(([name, , shown, extra]) => {
    const cell = make("th", null, (shown === plain ? "text " : "") + (extra || ""));
    cell.scope = "col";
    cell.dataset.name = name;
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", () => {
      const view = views[state.tab];
      // Numbers begin with the largest.
      view.reverse = view.sort === name ? !view.reverse : shown !== plain;
      view.sort = name;
      view.from = 0;
      ask();
    });
    cell.append(button);
    return cell;
  });
  $("columns").replaceChildren(...columns);
}

function levelOf(name, row) {
  if (name === "state") {
    if (/^slow|^expected|^full|^orphaned/.test(row.state)) return "bad";
    return /^held|^waits/.test(row.state) ? "warn" : /^offline|^not open/.test(row.state) ? "dim" : "";
  }
  return (name === "fill" && row.fill > 0.9) || (name === "dead" && row.dead) ? "bad" : "";
}

function makeRow(row) {
  const view = VIEWS[state.tab];
  const line = make("tr", null, view.opens ? "choice" : "");
  view.columns.forEach(([name, , shown, extra], index) => {
    const kind = (shown === plain ? "text " : "") + (extra || "") + " " + levelOf(name, row);
    const cell = make("td", null, kind);
    const value = row[name] === null ? "" : shown(row[name]);
    if (index === 0 && view.opens) {
      const button = make("button", value);
      button.type = "button";
      button.dataset[view.opens] = value;
      cell.append(button);
    } else {
      cell.textContent = value;
    }
    line.append(cell);
  });
  if (view.opens) line.addEventListener("click", () => choose(view.opens, row[view.columns[0][0]]));
  return line;
}

function showTable(table) {
  const view = views[state.tab], { noun, columns, opens } = VIEWS[state.tab];
  [...$("columns").children].forEach((cell, index) => {
    const [name, title] = columns[index], sorted = name === view.sort;
    cell.ariaSort = sorted ? (view.reverse ? "descending" : "ascending") : "none";
    cell.firstChild.textContent = title + (sorted ? (view.reverse ? " ▾" : " ▴") : "");
  });
  const focused = document.activeElement, named = focused && focused.dataset[opens];
  const namesakes = () => [...$("rows").querySelectorAll("button")].filter((each) => each.dataset[opens] === named);
  const place = named ? namesakes().indexOf(focused) : -1;
  $("rows").replaceChildren(...table.rows.map(makeRow));
  // The row that had the focus is another element now.
  if (place >= 0 && namesakes()[place]) namesakes()[place].focus();
  view.from = table.from;
  $("found").textContent = (table.found === table.total ? "" : `${table.found} of `) + `${table.total} ${noun}`;
  $("range").textContent = table.found ? `${table.from + 1} to ${table.from + table.rows.length}` : "none";
  $("previous").disabled = table.from === 0;
  $("next").disabled = table.from + table.rows.length >= table.found;
}

// One client, or one mailbox

function choose(kind, name) {
  location.hash = name ? kind + "=" + encodeURIComponent(name) : "";
}

function list(pairs) {
  const all = make("dl");
  for (const [name, value, kind] of pairs) all.append(make("dt", name), make("dd", value, kind));
  return all;
}

const LONG = ["reason", "rule", "patterns", "error"];

function grid(titles, rows) {
  const table = make("table"), head = make("tr");
  for (const title of titles) head.append(make("th", title, "text"));
  table.append(make("thead"), make("tbody"));
  table.tHead.append(head);
  for (const row of rows) {
    const line = make("tr");
    row.forEach((value, index) => line.append(make("td", value, LONG.includes(titles[index]) ? "long" : "text")));
    table.tBodies[0].append(line);
  }
  const wide = make("div", null, "wide");
  wide.append(table);
  return wide;
}

function section(title, titles, rows, none) {
  return [make("h3", title), rows.length ? grid(titles, rows) : make("p", none, "dim")];
}

function link(kind, name, shown) {
  const anchor = make("a", shown);
  anchor.href = `#${kind}=${encodeURIComponent(name)}`;
  return anchor;
}

function clientParts(client) {
  const parts = [list([
    ["state", client.state, levelOf("state", client)],
    ["since", clock(client.since)],
    ["configured in", client.place],
    ["queue", `${bytes(client.queue)}, when_full: ${client.when_full}`],
    ["administrator", client.admin ? "yes" : "no"],
  ])];
  if (client.mailbox) {
    const { ready, held, delayed, dead } = client.mailbox;
    const shown = `Mailbox: ${ready} ready, ${held} held, ${delayed} delayed, ${dead} dead`;
    const paragraph = make("p");
    paragraph.append(link("mailbox", client.name, shown));
    parts.push(paragraph);
  }
  return parts.concat(
    section(
      "Last refusals, drops and disconnects",
      ["last", "event", "from", "to", "code", "count", "reason", "rule"],
      client.incidents.map((each) => [
        clock(each.last), each.event, each.sender, each.recipient, each.code, each.count, each.reason,
        [each.rule, each.where].filter(Boolean).join("  "),
      ]),
      "None that the broker remembers.",
    ),
    section(
      "Connections",
      ["address", "from", "since", "in", "out", "waiting", "unanswered", "subscriptions", "state"],
      client.connections.map((each) => [
        each.address, each.peer, clock(each.since), count(each.in), count(each.out),
        `${bytes(each.waiting)} of ${bytes(each.queue)}`, each.unanswered, each.subscriptions,
        each.slow ? `slow: does not read, holds ${each.holds}` : each.held_by ? `held by ${each.held_by}` : "",
      ]),
      "Not connected.",
    ),
    section(
      "Channels",
      ["caller", "recipient", "since", "to recipient", "to caller", "waiting"],
      client.channels.map((each) => [
        `${each.caller} (${each.caller_peer})`, `${each.recipient} (${each.recipient_peer})`, clock(each.since),
        bytes(each.bytes_to_recipient), bytes(each.bytes_to_caller), bytes(each.waiting_bytes),
      ]),
      "None.",
    ),
    section("Rules", ["may", "patterns", "where"], Object.entries(client.rules).map(
      ([name, rules]) => [name, rules.patterns.join(", ") || "nothing", rules.where],
    )),
    make("h3", "Subscriptions"),
    make("p", client.subscriptions.join(", ") || "None.", client.subscriptions.length ? "" : "dim"),
  );
}

function mailboxParts(mailbox) {
  const { limits, letters } = mailbox;
  const facts = [
    ["state", mailbox.state, levelOf("state", mailbox)],
    ["messages", `${mailbox.ready} ready, ${mailbox.held} held, ${mailbox.delayed} delayed, ${mailbox.dead} dead`],
    ["bytes", bytes(mailbox.bytes)],
    ["oldest", mailbox.oldest === null ? "" : age(mailbox.oldest)],
  ];
  if (limits) {
    facts.push(
      ["configured in", mailbox.place],
      ["limits", `${count(limits.messages)} messages, ${bytes(limits.size)}, ${limits.attempts} attempts, when_full: ${limits.when_full}`],
      ["stores events", limits.subscribe.join(", ") || "none"],
    );
  }
  return [list(facts)].concat(
    section(
      "Connections that read it",
      ["address", "held", "window", "holds the oldest for"],
      mailbox.connections.map((each) => [
        each.address, each.held, each.window, each.oldest === null ? "" : age(each.oldest),
      ]),
      "None.",
    ),
    section(
      "Dead letters, the oldest first",
      ["seq", "stored", "from", "kind", "topic", "size", "attempts", "reason", "error"],
      (letters || []).map((each) => [
        each.seq, clock(each.stored_at), each.sender, each.kind, each.topic, bytes(each.size || 0), each.attempts,
        each.reason, each.error === each.reason ? "" : each.error,
      ]),
      letters ? "None." : "The store did not answer in time.",
    ),
    letters && mailbox.dead > letters.length
      ? [make("p", `${mailbox.dead - letters.length} more: brokerctl mailbox show ${mailbox.name} --state dead`, "dim")]
      : [],
  );
}

function showDetails(kind, facts) {
  $("detail-name").textContent = state.opened[kind];
  const linked = $("detail-body").contains(document.activeElement);
  $("detail-body").replaceChildren(...(
    !facts ? [make("p", `There is no ${kind} of this name.`)]
      : kind === "client" ? clientParts(facts) : mailboxParts(facts)
  ));
  // The only link that the details have is another element now.
  if (linked && $("detail-body").querySelector("a")) $("detail-body").querySelector("a").focus();
  if (!$("detail").open) $("detail").showModal();
}

// The broker

function showFacts(facts) {
  $("version").textContent = facts.version;
  const parts = ["clients", "subscriptions", "channels", "mailboxes"].map((name) => `${facts[name]} ${name}`);
  parts.push(`started ${clock(facts.started_at)}`);
  if (facts.host) parts.push(`host ${facts.host}`);
  if (facts.not_ready) parts.push(facts.not_ready);
  if (facts.cluster_failure) parts.push(`no other host: ${facts.cluster_failure}`);
  if (facts.reload_refused) parts.push("the last reload was refused");
  $("facts").textContent = parts.join(" · ");
  $("facts").className = facts.not_ready || facts.cluster_failure || facts.reload_refused ? "bad" : "";
  $("broker").replaceChildren(list([
    ["version", facts.version],
    ["routing loop", facts.routing],
    ["started", clock(facts.started_at)],
    ["upgrades since then", facts.upgrades],
    ["listens at", facts.listeners.join(", ")],
    ["most connections", count(facts.limit)],
    ["last reload", facts.reload_refused ? "refused: brokerd check shows why" : "accepted"],
  ]));
}

function showTab() {
  for (const name of TABS) $("tab-" + name).ariaPressed = String(state.tab === name);
  $("broker").hidden = state.tab !== "broker";
  $("listing").hidden = state.tab === "broker";
  if (state.tab === "broker") return;
  $("listing").ariaLabel = $("tab-" + state.tab).textContent;
  $("filter").placeholder = VIEWS[state.tab].hint;
  $("filter").value = views[state.tab].filter;
  $("rows").replaceChildren();
  makeColumns();
}

// The stream

function show(event) {
  lastEvent = Date.now();
  setLink(true);
  const news = JSON.parse(event.data);
  if (news.history) samples = news.history;
  else if (news.sample) samples.push(news.sample);
  samples = samples.slice(-SAMPLES);
  draw();
  showFacts(news.facts);
  if (news.table) showTable(news.table);
  for (const kind of Object.keys(state.opened)) showDetails(kind, news[kind]);
}

function setLink(there) {
  $("link").textContent = there ? "live" : "no connection to the broker; trying again";
  $("link").className = there ? "" : "lost";
}

function ask() {
  const query = new URLSearchParams({ view: state.tab, ...state.opened });
  const view = views[state.tab];
  if (view) {
    query.set("sort", view.sort);
    query.set("from", view.from);
    if (view.reverse) query.set("reverse", "1");
    if (view.filter) query.set("filter", view.filter);
  }
  if (stream) stream.close();
  stream = new EventSource("live?" + query);
  lastEvent = Date.now();
  stream.onmessage = show;
  stream.onerror = () => {
    setLink(false);
    // The browser tries again by itself, unless the answer was an error.
    if (stream.readyState === EventSource.CLOSED) setTimeout(ask, 2000);
  };
}

// The address names the client or the mailbox that is open.
function readHash() {
  const [kind, name] = [...new URLSearchParams(location.hash.slice(1))][0] || [];
  state.opened = name && ["client", "mailbox"].includes(kind) ? { [kind]: name } : {};
}

function onHash() {
  readHash();
  if (!Object.keys(state.opened).length && $("detail").open) $("detail").close();
  ask();
}

function changeView(change) {
  Object.assign(views[state.tab], change);
  ask();
}

function begin() {
  makeCharts();
  $("filter").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => changeView({ filter: $("filter").value.trim(), from: 0 }), 200);
  });
  $("search").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => changeView({ from: Math.max(0, views[state.tab].from - 100) }));
  $("next").addEventListener("click", () => changeView({ from: views[state.tab].from + 100 }));
  for (const name of TABS) {
    $("tab-" + name).addEventListener("click", () => { clearTimeout(typing); state.tab = name; showTab(); ask(); });
  }
  $("detail").addEventListener("close", () => { if (Object.keys(state.opened).length) choose("", ""); });
  window.addEventListener("hashchange", onHash);
  window.addEventListener("resize", draw);
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && state.tab !== "broker" && document.activeElement.tagName !== "INPUT") {
      event.preventDefault();
      $("filter").focus();
    }
  });
  // A connection that only seems to be open is made again.
  setInterval(() => { if (Date.now() - lastEvent > SILENCE_MS) { setLink(false); ask(); } }, 1000);
  readHash();
  showTab();
  ask();
}

begin();
