"""Syllables and English words from which words are invented."""

_ONSETS = "b br c ch d dr f g gl h j k kl l m n p pr qu r s sh st t th tr v w y z"
_VOWELS = "a e i o u ai ea ou"
_CODAS = "l m n r s t x nd rk ll"

# The parts of a syllable; the empty codas let some syllables end in their vowel.
SYLLABLE = (_ONSETS.split(), _VOWELS.split(), _CODAS.split() + [""] * 4)

# Common words of four letters and more, for their spelling.
_ENGLISH = """
able about above accept across action active address adult advance afraid after again against agency agree almost
alone along already although always among amount ancient angle animal annual another answer anyone appear apple apply
approach around arrive article artist aside asleep assume attack attempt author autumn average awake balance basket
battle beauty because become before begin behave behind believe belong below beneath benefit beside better between
beyond bicycle blanket blood board bottle bottom bought branch breakfast breath bridge bright bring broken brother
brought brown brush build burn business butter button calm candle captain careful carriage carry castle catch cattle
caught cause central certain chain chance change chapter charge cheap cheese chief children choice choose church
circle claim class clean clear clever climb clothes cloud coffee cold collect college colour column comfort common
compare complete concern condition connect consider contain continue control copper corner correct cotton council
country couple courage cover cream create creature crime crowd culture current curtain custom damage dance danger
daughter dead debate decide declare deep defend degree deliver demand depend describe desert deserve design detail
develop different difficult dinner direction discover discuss disease distance divide double doubt dozen drawn dream
dress drink drive dropped during early earth eastern edge education effect effort eight either elect element employ
empty encourage enemy energy engine enjoy enough enter entire equal escape especially evening event every evidence
exact example except exchange excite exercise exist expect expense explain express extra failure fairly faith familiar
family famous farther fashion father favour feather feeling fellow fence fever field fifteen fight figure final finger
finish flame flight float flood floor flour flower follow foot foreign forest forget forgive formal forward found
fourth freedom freeze fresh friend fright front frozen fruit further future gallery garden gather general gentle ghost
giant glad glass golden goods govern grain grand grass grateful grave great green ground group growth guard guess
guide habit half handle happen happy harbour hardly harvest health heart heavy height hello hidden highway history
hollow holy honest hope horse hospital hotel house however hundred hungry hurry husband imagine important improve
inch include increase indeed industry inform inside instead interest invite iron island issue itself jewel join
journey judge juice jump justice keep kettle kingdom kitchen knife knock know labour ladder language large latter
laugh launch lawn leader learn leather leave length lesson letter level liberty library light limit liquid listen
little living local lonely loose loud lower lucky lunch machine magic manner market marriage match material matter
meadow meaning measure medicine meeting member memory mention merchant message metal method middle might mighty
military milk million mineral minister minute mirror mistake mixture model modern moment money month moral morning
mother motion mountain mouth movement music mystery narrow nation native nature nearly neck needle neighbour neither
nephew nervous never night noble noise normal north nothing notice number object observe obtain ocean offer office
often operate opinion opposite orange order ordinary origin other ought outside owner oxygen package paint paper
parent particular partner party passage patience pattern payment peace pencil people perfect perform perhaps period
person photograph picture piece pilot pink planet plant plastic plate pleasant please plenty pocket poem point polish
polite popular position possess pottery pound poverty powder power practice prepare present press pretty prevent
price pride priest print prison private prize probable problem process produce profit program promise proper protect
proud prove provide public purchase purple purpose quality quarrel quarter queen question quick quiet quite rabbit
railway raise rather reach ready realize reason receive recent recognize record reduce refuse regard region regular
relation release remain remember remind remove repair repeat reply report request rescue respect result return reward
rhythm ribbon right river roast rocky roof rough round royal rubber running rural sacred safety sail salary salt
sample sandy satisfy scale scatter scene school science scissors scratch screen search season second secret section
seed select sense sentence separate serious servant settle seven several shade shadow shake shallow shape share sharp
sheep shelf shelter shine shoot shore short shoulder shout shower signal silence silver similar simple single sister
sixty skill sleep slight slope slowly small smell smile smoke smooth snow social society soft soldier solid someone
sorrow sound source south space speak special speech speed spirit split spoken spread spring square stage stair stamp
standard station steady steal steam steel stick stiff stomach stone storm story straight strange stream street
strength stretch strike string strong structure struggle student study style subject substance succeed sudden suffer
sugar suggest summer supper supply support suppose surface surprise surround swallow sweet swift swim sword system
talent taste teacher temple tender terrible thank theatre thick thief thing think third thirty though thousand thread
threat throat through throw thumb thunder ticket tight timber tired title together tomorrow tongue tooth total touch
toward tower track trade tradition traffic train translate travel treasure treat tremble trial trick trouble trunk
trust truth twelve twenty twist type ugly umbrella uncle under understand union universe unless until upon upper
upset useful usual valley value variety various vast vegetable vehicle vessel victory view village violent virtue
visit voice volume voyage waist walk wander warm warning waste watch water wealth weapon weather weave weight welcome
western wheat wheel where whether which while whisper whistle white whole wicked wide widow wild window winter wisdom
within without witness woman wonder wooden woollen world worship worth wound wrap wreck write wrong yellow yesterday
young youth zero
"""

ENGLISH = _ENGLISH.split()
