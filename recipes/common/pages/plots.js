"use strict";
// Draws every .figure of the page in the page's colours. A page with data-live is fetched anew every few seconds: the
// parts that changed are replaced, and a figure keeps what the reader zoomed to.

const touch = matchMedia("(pointer: coarse)").matches;

function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  const [ink, dim, line, paper] = ["--ink", "--dim", "--line", "--paper"].map((name) => style.getPropertyValue(name).trim());
  const axis = { gridcolor: line, linecolor: line, tickcolor: line, zerolinecolor: line };
  const layout = figure.layout;
  return {
    ...layout,
    font: { ...layout.font, color: ink, family: getComputedStyle(document.body).fontFamily },
    xaxis: { ...layout.xaxis, ...axis, automargin: true },
    yaxis: { ...layout.yaxis, ...axis, automargin: true },
    hoverlabel: { bgcolor: paper, bordercolor: line, font: { color: ink }, namelength: -1 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: dim, activecolor: ink },
    dragmode: touch ? false : "zoom", // a finger scrolls the page
    uirevision: "kept",
  };
}

function draw(div) {
  const figure = JSON.parse(div.querySelector("script").textContent);
  let plot = div.querySelector(".plot");
  if (!plot) {
    plot = div.appendChild(document.createElement("div"));
    plot.className = "plot";
  }
  const config = { displaylogo: false, responsive: true, displayModeBar: touch && figure.zoomable === true };
  config.modeBarButtons = [["zoomIn2d", "zoomOut2d", "pan2d", "resetScale2d"]];
  return Plotly.react(plot, figure.data, themed(figure), config);
}

function drawAll(root) {
  for (const div of root.querySelectorAll(".figure")) if (!div.closest("details:not([open])")) draw(div);
}

document.addEventListener("toggle", (event) => event.target.open && drawAll(event.target), true);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(document));

const live = document.body.querySelector("[data-live]");
const parts = new Map(); // {id of a section: its markup as it came}
const markup = (part) => part.innerHTML;
const titles = (part) => [...part.querySelectorAll(".chart h3, .chart > p")].map((title) => title.textContent).join("\n");

function replace(old, fresh) {
  const kept = [...old.querySelectorAll("details")].map((one) => [one.dataset.name, one.open]);
  if (fresh.querySelector(".chart") && titles(old) === titles(fresh)) {
    const figures = fresh.querySelectorAll(".figure script");
    old.querySelectorAll(".figure script").forEach((script, index) => (script.textContent = figures[index].textContent));
  } else {
    old.replaceChildren(...[...fresh.childNodes].map((node) => document.importNode(node, true)));
    const open = new Map(kept);
    for (const one of old.querySelectorAll("details")) one.open = open.get(one.dataset.name) ?? one.open;
  }
  drawAll(old);
}

async function update() {
  const shown = document.getElementById("live");
  try {
    const answer = await fetch("/", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const fresh of page.querySelectorAll("section[id]")) {
      if (parts.get(fresh.id) === markup(fresh)) continue;
      parts.set(fresh.id, markup(fresh));
      replace(document.getElementById(fresh.id), fresh);
    }
    document.title = page.title;
    shown.textContent = "Live, as of " + new Date().toLocaleTimeString();
  } catch (error) {
    shown.textContent = "No longer live: " + error.message;
  }
  setTimeout(update, 1000 * live.dataset.live);
}

if (live) for (const part of document.querySelectorAll("section[id]")) parts.set(part.id, markup(part));
drawAll(document);
if (live) setTimeout(update, 1000 * live.dataset.live);
