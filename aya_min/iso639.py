"""The facts of ISO 639 and CLDR (2026) that `languages.language_code` reads: codes, English names, scripts.

It holds the languages with a two-letter code, those that CLDR names in English, and those of FLORES-200 and
the Aya data sets. A line holds entries "code [ISO 639-3 code] name|name".
"""

LANGUAGES = """
aa aar Afar; ab abk Abkhazian; ae ave Avestan; af afr Afrikaans; ak aka Akan; am amh Amharic;
an arg Aragonese; ar ara Arabic|Modern Standard Arabic|Standard Arabic; as asm Assamese; av ava Avaric;
ay aym Aymara|Central Aymara; az aze Azerbaijani|North Azerbaijani; ba bak Bashkir;
be bel Belarusian|Belorussian; bg bul Bulgarian; bi bis Bislama; bm bam Bambara; bn ben Bengali|Bangla;
bo bod Tibetan|Standard Tibetan; br bre Breton; bs bos Bosnian; ca cat Catalan|Valencian; ce che Chechen;
ch cha Chamorro; co cos Corsican; cr cre Cree; cs ces Czech; cu chu Church Slavic; cv chv Chuvash;
cy cym Welsh; da dan Danish; de deu German; dv div Divehi|Maldivian; dz dzo Dzongkha; ee ewe Ewe;
el ell Modern Greek|Greek; en eng English; eo epo Esperanto; es spa Spanish|Castilian;
et est Estonian|Standard Estonian; eu eus Basque; fa fas Persian|Farsi|Iranian Persian|Western Persian;
ff ful Fulah|Fula; fi fin Finnish; fj fij Fijian; fo fao Faroese; fr fra French; fy fry Western Frisian;
ga gle Irish; gd gla Scottish Gaelic|Gaelic|Scots Gaelic; gl glg Galician; gn grn Guarani; gu guj Gujarati;
gv glv Manx; ha hau Hausa; he heb Hebrew|Modern Hebrew; hi hin Hindi; ho hmo Hiri Motu; hr hrv Croatian;
ht hat Haitian|Haitian Creole; hu hun Hungarian; hy hye Armenian; hz her Herero; ia ina Interlingua;
id ind Indonesian|Bahasa Indonesia; ie ile Interlingue; ig ibo Igbo; ii iii Sichuan Yi|Nuosu; ik ipk Inupiaq;
io ido Ido; is isl Icelandic; it ita Italian; iu iku Inuktitut; ja jpn Japanese; jv jav Javanese;
ka kat Georgian; kg kon Kongo|Kikongo; ki kik Kikuyu; kj kua Kuanyama; kk kaz Kazakh; kl kal Kalaallisut;
km khm Khmer|Central Khmer; kn kan Kannada; ko kor Korean; kr kau Kanuri|Central Kanuri; ks kas Kashmiri;
ku kur Kurdish|Northern Kurdish|Kurmanji; kv kom Komi; kw cor Cornish; ky kir Kirghiz|Kyrgyz; la lat Latin;
lb ltz Luxembourgish|Letzeburgesch; lg lug Ganda; li lim Limburgan|Limburgish; ln lin Lingala;
lo lao Lao|Laotian; lt lit Lithuanian; lu lub Luba-Katanga; lv lav Latvian|Standard Latvian;
mg mlg Malagasy|Plateau Malagasy; mh mah Marshallese; mi mri Maori; mk mkd Macedonian; ml mal Malayalam;
mn mon Mongolian|Halh Mongolian; mr mar Marathi; ms msa Malay|Standard Malay|Bahasa Melayu; mt mlt Maltese;
my mya Burmese|Myanmar; na nau Nauru; nb nob Norwegian Bokmål|Bokmål; nd nde North Ndebele; ne nep Nepali;
ng ndo Ndonga; nl nld Dutch; nn nno Norwegian Nynorsk|Nynorsk; no nor Norwegian; nr nbl South Ndebele;
nv nav Navajo; ny nya Chichewa|Nyanja|Chewa; oc oci Occitan; oj oji Ojibwa; om orm Oromo|West Central Oromo;
or ori Oriya|Odia; os oss Ossetian|Ossetic; pa pan Panjabi|Punjabi|Eastern Panjabi; pi pli Pali;
pl pol Polish; ps pus Pushto|Pashto|Southern Pashto|Pashtu; pt por Portuguese; qu que Quechua;
rm roh Romansh; rn run Rundi; ro ron Romanian|Moldavian|Moldovan|Daco-Romanian; ru rus Russian;
rw kin Kinyarwanda|Rwanda; sa san Sanskrit; sc srd Sardinian; sd snd Sindhi; se sme Northern Sami;
sg sag Sango; si sin Sinhala|Sinhalese; sk slk Slovak; sl slv Slovenian; sm smo Samoan; sn sna Shona;
so som Somali; sq sqi Albanian|Tosk Albanian; sr srp Serbian; ss ssw Swati; st sot Southern Sotho|Sesotho;
su sun Sundanese; sv swe Swedish; sw swa Swahili|Kiswahili; ta tam Tamil; te tel Telugu; tg tgk Tajik;
th tha Thai; ti tir Tigrinya; tk tuk Turkmen; tl tgl Tagalog; tn tsn Tswana; to ton Tonga|Tongan;
tr tur Turkish; ts tso Tsonga; tt tat Tatar; tw twi Twi; ty tah Tahitian; ug uig Uighur|Uyghur;
uk ukr Ukrainian; ur urd Urdu; uz uzb Uzbek|Northern Uzbek; ve ven Venda; vi vie Vietnamese; vo vol Volapük;
wa wln Walloon; wo wol Wolof; xh xho Xhosa; yi yid Yiddish|Eastern Yiddish; yo yor Yoruba; za zha Zhuang;
zh zho Chinese|Mandarin|Mandarin Chinese|Simplified Chinese; zu zul Zulu; ace Achinese|Acehnese; ach Acoli;
acm Mesopotamian Arabic; acq Ta'izzi-Adeni Arabic; acw Hijazi Arabic; ada Adangme; ady Adyghe;
aeb Tunisian Arabic; afb Gulf Arabic; afh Afrihili; agq Aghem; ain Ainu; ajp South Levantine Arabic;
akk Akkadian; akz Alabama; ale Aleut; aln Gheg Albanian; alt Southern Altai; ang Old English; ann Obolo;
anp Angika; apc Levantine Arabic|North Levantine Arabic; apd Sudanese Arabic; arc Official Aramaic|Aramaic;
arn Mapudungun|Mapuche; aro Araona; arp Arapaho; arq Algerian Arabic; ars Najdi Arabic; arw Arawak;
ary Moroccan Arabic; arz Egyptian Arabic; asa Asu; ase American Sign Language; ast Asturian; atj Atikamekw;
avk Kotava; awa Awadhi; ayl Libyan Arabic; ayn Sanaani Arabic; azb South Azerbaijani; bal Baluchi;
ban Balinese; bar Bavarian; bas Basa|Basaa; bax Bamun; bbc Batak Toba; bbj Ghomálá'; bcc Southern Balochi;
bej Beja; bem Bemba; bew Betawi; bez Bena; bfd Bafut; bfq Badaga; bgc Haryanvi; bgn Western Balochi;
bho Bhojpuri; bik Bikol; bin Bini; bjn Banjar; bkm Kom; bla Siksika; blo Anii; blt Tai Dam; bpy Bishnupriya;
bqi Bakhtiari; bra Braj; brh Brahui; brx Bodo; bss Akoose; bua Buriat; bug Buginese; bum Bulu;
byn Bilin|Blin; byv Medumba; cad Caddo; car Galibi Carib|Carib; cay Cayuga; cch Atsam; ccp Chakma;
ceb Cebuano; cgg Chiga; chb Chibcha; chg Chagatai; chk Chuukese; chm Mari; chn Chinook jargon; cho Choctaw;
chp Chipewyan; chr Cherokee; chy Cheyenne; cic Chickasaw; cjk Chokwe; ckb Central Kurdish|Sorani;
clc Chilcotin; cop Coptic; cps Capiznon; crg Michif; crh Crimean Tatar; crj Southern East Cree;
crk Plains Cree; crl Northern East Cree; crm Moose Cree; crr Carolina Algonquian; crs Seselwa Creole French;
csb Kashubian; csw Swampy Cree; dak Dakota; dar Dargwa; dav Taita; del Delaware; den Slave;
dgr Tlicho|Dogrib; din Dinka|Southwestern Dinka; dje Zarma; doi Dogri; dsb Lower Sorbian;
dtp Kadazan Dusun|Central Dusun; dua Duala; dum Middle Dutch; dyo Jola-Fonyi; dyu Dyula; dzg Dazaga;
ebu Embu; efi Efik; egl Emilian; egy Egyptian|Ancient Egyptian; eka Ekajuk; elx Elamite; enm Middle English;
esu Central Yupik; ewo Ewondo; ext Extremaduran; fan Fang; fil Filipino; fit Tornedalen Finnish; fon Fon;
frc Cajun French; frm Middle French; fro Old French; frp Arpitan; frr Northern Frisian; frs Eastern Frisian;
fur Friulian; fuv Nigerian Fulfulde; gaa Ga; gag Gagauz; gan Gan Chinese; gay Gayo; gba Gbaya;
gbz Zoroastrian Dari; gez Geez; gil Gilbertese; glk Gilaki; gmh Middle High German; goh Old High German;
gom Goan Konkani; gon Gondi; gor Gorontalo; got Gothic; grb Grebo; grc Ancient Greek; gsw Swiss German;
guc Wayuu; gur Farefare|Frafra; guz Gusii; gwi Gwich'in; hai Haida; hak Hakka Chinese|Hakka; haw Hawaiian;
hax Southern Haida; hif Fiji Hindi; hil Hiligaynon; hit Hittite; hmn Hmong; hnd Southern Hindko;
hne Chhattisgarhi; hnj Hmong Njua; hsb Upper Sorbian; hsn Xiang Chinese; hup Hupa; hur Halkomelem;
hwc Hawai'i Creole English|Hawaiian Pidgin; iba Iban; ibb Ibibio; ikt Inuinnaqtun|Western Canadian Inuktitut;
ilo Iloko|Ilocano; inh Ingush; izh Ingrian; jam Jamaican Creole English|Jamaican Patois; jbo Lojban;
jgo Ngomba; jmc Machame; jpr Judeo-Persian; jrb Judeo-Arabic; jut Jutish; kaa Kara-Kalpak; kab Kabyle;
kac Kachin|Jingpho; kaj Jju; kam Kamba; kaw Kawi; kbd Kabardian; kbl Kanembu; kbp Kabiyè; kcg Tyap;
kde Makonde; kea Kabuverdianu; ken Kenyang; kfo Koro; kgp Kaingang; kha Khasi; kho Khotanese;
khq Koyra Chiini Songhay|Koyra Chiini; khw Khowar; kiu Kirmanjki; kkj Kako; kln Kalenjin; kmb Kimbundu;
koi Komi-Permyak; kok Konkani; kos Kosraean; kpe Kpelle; krc Karachay-Balkar; kri Krio; krj Kinaray-A;
krl Karelian; kru Kurukh; ksb Shambala; ksf Bafia; ksh Kölsch|Colognian; kum Kumyk; kut Kutenai;
kwk Kwak'wala; kxv Kuvi; lad Ladino; lag Rangi|Langi; lah Lahnda; lam Lamba; lez Lezghian;
lfn Lingua Franca Nova; lij Ligurian; lil Lillooet; liv Liv|Livonian; lkt Lakota; lmo Lombard; lol Mongo;
lou Louisiana Creole; loz Lozi; lrc Northern Luri; lsm Saamia; ltg Latgalian; lua Luba-Lulua|Luba-Kasai;
lui Luiseno; lun Lunda; luo Luo; lus Lushai|Mizo; luy Luyia; lzh Literary Chinese; lzz Laz; mad Madurese;
maf Mafa; mag Magahi; mai Maithili; mak Makasar; man Mandingo; mas Masai; mde Maba; mdf Moksha; mdr Mandar;
men Mende; mer Meru; mfe Morisyen; mga Middle Irish; mgh Makhuwa-Meetto; mgo Meta'; mic Mi'kmaq|Mi'kmaw;
min Minangkabau; mnc Manchu; mni Manipuri|Meitei; moe Innu|Innu-aimun; moh Mohawk; mos Mossi;
mrj Western Mari; mua Mundang; mul Multiple languages; mus Creek|Muscogee; mwl Mirandese; mwr Marwari;
mwv Mentawai; mww Hmong Daw|White Hmong; mye Myene; myv Erzya; mzn Mazanderani;
nan Min Nan Chinese|Hokkien|Southern Min; nap Neapolitan; naq Khoekhoe|Nama; nds Low German;
new Nepal Bhasa|Newari; nia Nias; niu Niuean; njo Ao Naga; nmg Kwasio; nnh Ngiemboon; nog Nogai;
non Old Norse; nov Novial; nqo N'Ko; nso Pedi|Northern Sotho|Sepedi; nus Nuer; nwc Classical Newari;
nym Nyamwezi; nyn Nyankole; nyo Nyoro; nzi Nzima; ojb Northwestern Ojibwa; ojc Central Ojibwa;
ojs Severn Ojibwa|Oji-Cree; ojw Western Ojibwa; oka Okanagan; osa Osage; ota Ottoman Turkish; pag Pangasinan;
pal Pahlavi; pam Pampanga; pap Papiamento; pau Palauan; pcd Picard; pcm Nigerian Pidgin;
pdc Pennsylvania German; pdt Plautdietsch; peo Old Persian; pfl Pfaelzisch|Palatine German; phn Phoenician;
pis Pijin; pms Piemontese|Piedmontese; pnb Western Punjabi|Western Panjabi; pnt Pontic; pon Pohnpeian;
pqm Malecite-Passamaquoddy|Maliseet-Passamaquoddy; prg Prussian; pro Old Provençal; prs Dari; quc K'iche';
qug Chimborazo Highland Quichua; quy Ayacucho Quechua; raj Rajasthani; rap Rapanui; rar Rarotongan;
rgn Romagnol; rhg Rohingya; rif Tarifit|Riffian; rof Rombo; rom Romany|Romani; rtm Rotuman; rue Rusyn;
rug Roviana; rup Macedo-Romanian|Aromanian; rwk Rwa; sad Sandawe; sah Yakut; sam Samaritan Aramaic;
saq Samburu; sas Sasak; sat Santali; saz Saurashtra; sba Ngambay; sbp Sangu; scn Sicilian; sco Scots;
sdc Sassarese Sardinian; sdh Southern Kurdish; see Seneca; seh Sena; sei Seri; sel Selkup;
ses Koyraboro Senni Songhai|Koyraboro Senni; sga Old Irish; sgs Samogitian; shi Tachelhit; shn Shan;
shu Chadian Arabic; sid Sidamo; skr Saraiki; slh Southern Puget Sound Salish|Southern Lushootseed;
sli Lower Silesian; sly Selayar; sma Southern Sami; smj Lule Sami; smn Inari Sami; sms Skolt Sami;
snk Soninke; sog Sogdian|Sogdien; srn Sranan Tongo; srr Serer; ssy Saho;
stq Saterfriesisch|Saterland Frisian; str Straits Salish; suk Sukuma; sus Susu; sux Sumerian;
swb Maore Comorian|Comorian; swc Congo Swahili; syc Classical Syriac; syr Syriac; szl Silesian; taq Tamasheq;
tce Southern Tutchone; tcy Tulu; tem Timne; teo Teso; ter Tereno; tet Tetum; tgx Tagish; tht Tahltan;
tig Tigre; tiv Tiv; tkl Tokelau; tkr Tsakhur; tlh Klingon; tli Tlingit; tly Talysh; tmh Tamashek;
tog Nyasa Tonga; tok Toki Pona; tpi Tok Pisin; tru Turoyo; trv Sediq|Taroko; trw Torwali; tsd Tsakonian;
tsi Tsimshian; ttm Northern Tutchone; ttt Muslim Tat; tum Tumbuka; tvl Tuvalu; twq Tasawaq; tyv Tuvinian;
tzm Central Atlas Tamazight; udm Udmurt; uga Ugaritic; umb Umbundu; vai Vai; vec Venetian; vep Veps;
vls Vlaams|West Flemish; vmf Mainfränkisch|Main-Franconian; vmw Makhuwa; vot Votic; vro Võro; vun Vunjo;
wae Walser; wal Wolaytta; war Waray; was Washo; wbp Warlpiri; wuu Wu Chinese|Wu; xal Kalmyk; xmf Mingrelian;
xnr Kangri; xog Soga; yao Yao; yap Yapese; yav Yangben; ybb Yemba; yrl Nhengatu|Nheengatu;
yue Yue Chinese|Cantonese; zap Zapotec; zbl Blissymbols; zea Zeeuws|Zeelandic; zen Zenaga;
zgh Standard Moroccan Tamazight; zun Zuni; zxx No linguistic content; zza Zaza
"""

# Codes that stand for another code: bibliographic codes of ISO 639-2, withdrawn codes, and the member of a
# macrolanguage that published data mean by its name (arb: Standard Arabic). Its remaining members are
# languages of their own (ary). zhs and zht, which some data have, are no codes of ISO 639.
ALIASES = """
alb sq; als sq; arb ar; arm hy; ayr ay; azj az; baq eu; bur my; chi zh; cmn zh; cnr sr-ME; cze cs; dik din;
dut nl; ekk et; fat ak; fre fr; gaz om; geo ka; ger de; gre el; gug gn; hbs sr-Latn; ice is; ike iu; in id;
iw he; ji yi; jw jv; khk mn; kmr ku; knc kr; kng kg; kpv kv; lvs lv; mac mk; mao mi; may ms; mo ro; mol ro;
npi ne; ojg oj; ory or; pbt ps; pbu ps; per fa; pes fa; plt mg; quz qu; rum ro; scc sr; scr hr; sh sr-Latn;
slo sk; src sc; swh sw; tib bo; und other; uzn uz; wel cy; ydd yi; zhs zh; zht zh-Hant; zsm ms; zyb za
"""

# Further English names: of the varieties of countries, and of languages that have several names, ISO 639-2's
# among them.
NAMES = """
pt-BR Brazilian Portuguese; pt-PT European Portuguese; en-US American English; en-GB British English;
en-AU Australian English; en-CA Canadian English; fr-CA Canadian French; fr-CH Swiss French;
de-AT Austrian German; de-CH Swiss High German; es-419 Latin American Spanish; es-MX Mexican Spanish;
es-ES European Spanish; nl-BE Flemish; sr-Latn Serbo-Croatian; sr-ME Montenegrin; zh Simplified Chinese;
zh-Hant Traditional Chinese; other other; fy West Frisian|Frisian; st Sotho; lg Luganda; rn Kirundi;
tn Setswana; zu isiZulu; xh isiXhosa; ki Gikuyu; kl Greenlandic; av Avar; tyv Tuvan;
bxr Buryat|Russia Buriat; nah Nahuatl; yua Yucatec Maya|Maya; lzh Classical Chinese; nan Taiwanese;
acm Iraqi Arabic; ayn Yemeni Arabic; aii Assyrian Neo-Aramaic; se Sami; ff Fulani|Pulaar|Fulfulde; luy Luhya;
nr Southern Ndebele; nd Northern Ndebele|Ndebele; ss Swazi; bho Bihari; bal Balochi; lrc Luri; lhu Lahu;
pam Kapampangan; tsg Tausug; pcm Naija; rom Roma; crs Seychellois Creole; mfe Mauritian Creole;
gcf Guadeloupean Creole; cu Old Slavonic|Church Slavonic|Old Bulgarian|Old Church Slavonic;
ie Occidental; kj Kwanyama; li Limburger; dv Dhivehi; nv Navaho; za Chuang; oc Provençal;
ia Interlingua (International Auxiliary Language Association); ast Bable|Leonese|Asturleonese;
gsw Alemannic|Alsatian; nds Low Saxon; fil Pilipino; crh Crimean Turkish; bej Bedawiyet; bin Edo; byn Bilin;
chp Dene Suline; xal Oirat;
nij Ngaju; bbc Toba Batak; mic Micmac; rar Cook Islands Maori; rup Arumanian; nwc Old Newari|Classical Nepal
Bhasa; zbl Blissymbolics|Bliss; tlh tlhIngan Hol
"""

# The script in which a language is usually written, where it is not Latin: a tag does not repeat it.
SCRIPTS = """
Arab acm acq acw aeb afb ajp apc apd ar arq ars ary arz ayl ayn azb bal bcc bej bgn bqi brh chg ckb fa gbz
glk hnd khw ks lah lrc mde mzn ota pnb prs ps sd sdh shu skr swb trw ug ur bgp haz uzs;
Cyrl ab ady alt av ba be bg bua ce chm cu cv dar inh kaa kbd kk koi krc kum kv ky lez mdf mhr mk mn mrj
myv nog os ru rue sah sel sr tg tt tyv udm uk xal;
Deva anp awa bgc bho bra brx doi gom gon hi hif hne kok kru mag mai mr mwr ne new raj sa xnr;
Cans cr crj crk crl crm csw iu oj ojs; Hans gan hak hsn lzh nan wuu zh; Ethi am byn gez ti tig wal;
Hebr he jpr jrb lad yi; Beng as bn bpy ctg mni rkt syl; Grek el grc pnt tsd; Tfng ber shi tzm zen zgh;
Geor ka xmf; Hmnp hnj mww; Knda kn tcy; Mymr ksw mnw my shn; Sinh pi si; Syrc aii syc syr; Taml bfq ta;
Tibt bo dz khg; Xsux akk hit;
Armi arc; Armn hy; Avst ae; Bali kaw; Bamu bax; Brah kho; Cakm ccp; Cher chr; Copt cop; Egyp egy; Goth got;
Gujr gu; Guru pa; Hant yue; Jpan ja; Kana ain; Khmr km; Kore ko; Laoo lo; Latg mga; Mlym ml; Mong mnc mvf;
Newa nwc; Nkoo nqo; Olck sat; Orya or; Osge osa; Phli pal; Phnx phn; Rohg rhg; Runr non; Samr sam;
Saur saz; Sgnw ase; Sogd sog; Tavt blt; Telu te; Thaa dv; Thai th; Ugar uga; Vaii vai;
Xpeo peo; Lana nod; Tale tdd; Yiii ii
"""
