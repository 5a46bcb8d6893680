const readout = document.getElementById("readout");
const show = (event) => {
  const token = event.target.closest("i[title]");
  if (!token) return;
  readout.textContent = JSON.stringify(token.textContent).slice(0, 60) + "  " + token.title;
  readout.hidden = false;
};
document.addEventListener("mouseover", show);
document.addEventListener("click", show);
